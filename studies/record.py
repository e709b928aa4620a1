"""The record that a full run of a study or benchmark leaves: where it ran, on what, figures, targets.

A benchmark of several parts has them all in one record, each with its commit and its machine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from rich.console import Console
from rich.markdown import Markdown

from ipvla.files import write_text
from ipvla.sim.fingerprint import commit, fingerprint
from ipvla.storage import SOURCE_TREE, StorageRoots
from studies.tables import target_table

RESULTS: Final = SOURCE_TREE / "benchmarks" / "results"
#: Measurements, as JSON values.
Figures = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure that was promised.

    Attributes:
        value: None where it was not measured or means nothing; that never meets.
        at_least: on which side of `bound` it should lie.
        beyond: `bound` itself does not meet.
        interval: (low, high) around the value.
        note: what it is of, or why there is no value.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool
    beyond: bool = False
    interval: tuple[float, float] | None = None
    note: str = ""

    @classmethod
    def of(
        cls, name: str, one: Mapping[str, Any] | None, bound: float, at_least: bool = False, note: str = ""
    ) -> Self:
        """Of an estimate {"value", "low", "high"}; None is one that was not measured."""
        if one is None or one["value"] is None:
            return cls(name, None, bound, at_least, note=note or "not measured")
        interval = None if one["low"] is None or one["high"] is None else (one["low"], one["high"])
        return cls(name, one["value"], bound, at_least, interval=interval, note=note)

    @property
    def met(self) -> bool:
        if self.value is None or (self.beyond and self.value == self.bound):
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `beyond`, `low` and `high`, and `note` only where they say something."""
        values: dict[str, Any] = {n: getattr(self, n) for n in ("name", "value", "bound", "at_least", "met")}
        if self.beyond:
            values["beyond"] = True
        if self.interval is not None:
            values["low"], values["high"] = self.interval
        return values | ({"note": self.note} if self.note else {})


def write_record(
    name: str,
    seeds: Sequence[int],
    figures: Mapping[str, Any],
    targets: Sequence[Target],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `benchmarks/results/NAME.json` with commit, machine and library versions of this run.

    Args:
        seeds: all that the figures are of.
        earlier: runs that gave some of the figures, the `runs` of `read_record`.
    """
    run = this_run()
    runs = {"runs": [*earlier, run]} if earlier else {}
    results = {"figures": figures, "targets": [target.to_dict() for target in targets]}
    record = {**run, "seeds": list(seeds), **results, **runs}
    return write_text(RESULTS / f"{name}.json", laid_out(record) + "\n")


def conclude(
    name: str,
    seeds: Sequence[int],
    figures: Mapping[str, Any],
    targets: Sequence[Target],
    console: Console,
    *,
    quick: bool = False,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Shows the targets; what is not in small is recorded, see `write_record`."""
    show_targets(targets, console)
    if not quick:
        console.print(f"written to {write_record(name, seeds, figures, targets, earlier)}")


def show_targets(targets: Sequence[Target], console: Console) -> None:
    """As a table."""
    console.print(Markdown(target_table([target.to_dict() for target in targets])))


def read_record(name: str) -> dict[str, Any] | None:
    """What `write_record` wrote, with `runs` if it was left out for being one; None if there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return {"runs": [{key: record[key] for key in ("commit", "machine")}], **record}


def this_run() -> dict[str, Any]:
    """Commit and machine, as records have them."""
    machine = {"cpu": cpu_name(), "os": platform.platform(), **fingerprint()}
    return {"commit": commit(), "machine": machine}


def laid_out(value: Any, indent: str = "") -> str:
    """JSON of two spaces' indentation; a list or object of nothing but plain values stands on one line."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(part, Mapping | list | tuple) for part in parts):
        return json.dumps(value)
    deeper = indent + "  "
    if isinstance(value, Mapping):
        lines = [f"{deeper}{json.dumps(str(name))}: {laid_out(part, deeper)}" for name, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + laid_out(part, deeper) for part in value) + f"\n{indent}]"


def cpu_name() -> str:
    """Number and model name of the processors, where Linux knows them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


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
        measured = {**measure(part), "run": began}
        if not study.quick and (record := read_record(name)):
            figures = dict(record["figures"])  # other processes may have measured other parts meanwhile
        figures[part] = measured
        if not study.quick:
            console.print(f"written to {write_record(name, seeds, figures, targets(figures))}")
    show_targets(targets(figures), console)
    return figures
