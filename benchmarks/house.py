"""The house in order: how much code there is, how long tests and quickstart take, whether hands close.

    python -m benchmarks.house --test_minutes 14.2 --test_all_minutes 38 [--quick true]

The quickstart's figures are those of `benchmarks/results/quickstart.json`. A full run writes
`benchmarks/results/house.json`, in which `before` is what was measured at `BEFORE`'s commit; what was not measured
meets no target. `--quick` writes nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.cli import run
from studies.record import Target, conclude, read_record

PACKAGES: Final = ("ipvla", "evaluators", "ray_jobs", "studies", "benchmarks", "integrations")
#: Measured at commit 7032267 on two cores; minutes with AVX-512 absent, where there is a range its middle.
BEFORE: Final = {
    "files": 342,
    "lines": 33592,
    "benchmarks_lines": 6789,
    "test_minutes": 33.5,
    "quickstart_minutes": 45.0,
    "quickstart_count_gru": 0.817,
}
#: Figure -> (bound, whether at least).
BOUNDS: Final = {
    "test_minutes": (15.0, False),
    "test_all_minutes": (40.0, False),
    "quickstart_minutes": (20.0, False),
    "quickstart_count_gru": (0.95, True),
    "gripper_right": (1.0, True),
    "files": (280, False),
    "lines": (30_000, False),
    "benchmarks_lines": (4000, False),
}


@dataclass(frozen=True)
class HouseStudy:
    """What is known from elsewhere.

    Attributes:
        quick: writes nothing.
        test_minutes, test_all_minutes: of `make test` and `make test-all` after set-up; None if not measured.
    """

    quick: bool = False
    test_minutes: float | None = None
    test_all_minutes: float | None = None


def modules(root: Path, *packages: str) -> Iterator[list[str]]:
    """The non-blank lines of every Python module that has some."""
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if lines := [line for line in path.read_text().splitlines() if line.strip()]:
                yield lines


def measure(root: Path) -> dict[str, int]:
    """How much code there is outside tests: modules, and non-blank lines."""
    lines = [len(module) for module in modules(root, *PACKAGES)]
    small = [len(module) for module in modules(root, "benchmarks", "studies")]
    return {"files": len(lines), "lines": sum(lines), "benchmarks_lines": sum(small)}


def quickstart_figures(record: dict[str, Any] | None) -> dict[str, float]:
    """Minutes, and the rate of the policy with `gru` on count, from the quickstart's record."""
    if record is None:
        return {}
    minutes, count = record["figures"]["wall_s"] / 60, record["figures"]["success"]["gru"]["count"]["rate"]
    return {"quickstart_minutes": minutes, "quickstart_count_gru": count}


def gripper_right() -> float:
    """Share of protocols x players whose hand closes at "close", opens at "open": `tests.sim.gripper_matrix`."""
    from tests.sim.gripper_matrix import gripper_matrix, gripper_right

    with tempfile.TemporaryDirectory() as scratch:
        return gripper_right(gripper_matrix(Path(scratch)))


def targets(figures: dict[str, Any]) -> list[Target]:
    """The bounds, beside what was there before."""
    before = figures["before"]
    notes = {name: f"before: {before[name]:g}" if name in before else "" for name in BOUNDS}
    return [
        Target(name, figures.get(name), bound, at_least, note=notes[name])
        for name, (bound, at_least) in BOUNDS.items()
    ]


def main(study: HouseStudy) -> None:
    """Measures, prints, and on a full run records."""
    suites = {"test_minutes": study.test_minutes, "test_all_minutes": study.test_all_minutes}
    quickstart = quickstart_figures(read_record("quickstart"))
    figures = {"before": BEFORE, **measure(SOURCE_TREE), **suites, **quickstart, "gripper_right": gripper_right()}
    conclude("house", [], figures, targets(figures), Console(), quick=study.quick)


if __name__ == "__main__":
    run(HouseStudy, main, __doc__)
