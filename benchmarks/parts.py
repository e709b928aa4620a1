"""A benchmark of several parts, each with its figures, its commit and its machine in one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console
from rich.markdown import Markdown

from ipvla.storage import StorageRoots
from studies.record import Target, read_record, this_run, write_record
from studies.tables import target_table

Figures = dict[str, Any]


@dataclass(frozen=True)
class PartStudy(StorageRoots):
    """Settings that all benchmarks of parts have.

    Attributes:
        quick: in small, in a temporary place unless a storage root is given; results mean nothing.
        parts: what is measured; empty for all.
    """

    all_parts: ClassVar[tuple[str, ...]]
    quick: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.require("parts", self.all_parts)

    @property
    def measured(self) -> tuple[str, ...]:
        """The parts in their order."""
        return tuple(part for part in self.all_parts if part in (self.parts or self.all_parts))

    def require(self, setting: str, choices: Sequence[str]) -> None:
        """ValueError if the setting has a name that is none of these."""
        if unknown := sorted(set(getattr(self, setting)) - set(choices)):
            raise ValueError(f"{setting}: {unknown} cannot be measured; choose among {', '.join(choices)}")

    def require_at_least(self, least: int, *settings: str) -> None:
        """ValueError if one of these settings is smaller."""
        for name in settings:
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")


def measure_parts(
    name: str,
    study: PartStudy,
    measure: Callable[[str], Mapping[str, Any]],
    targets: Callable[[Figures], list[Target]],
    console: Console,
    seeds: Sequence[int] = (),
) -> Figures:
    """Measures the parts; what is not in small is recorded after each, beside what is there of the others."""
    record = None if study.quick else read_record(name)
    figures: Figures = dict(record["figures"]) if record else {}
    for part in study.measured:
        console.rule(part)
        began = this_run()
        figures[part] = {**measure(part), "run": began}
        if not study.quick:
            console.print(f"written to {write_record(name, seeds, figures, targets(figures))}")
    console.print(Markdown(target_table([target.to_dict() for target in targets(figures)])))
    return figures
