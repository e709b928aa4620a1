"""Success of the scripted expert on LIBERO's own suites, through the rollout service, per task.

    python -m benchmarks.expert --libero_assets DIRECTORY [--quick true]

Every published initial state of `libero_spatial` and `libero_object`, by protocol `openvla`. A full run writes
`benchmarks/results/expert.json`; one that was interrupted goes on where it was, if it gets the same storage root.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.markdown import head, line
from benchmarks.record import Target, write_record
from benchmarks.scratch import placed
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.sim.standard.assets import provide_assets
from ipvla.sim.standard.tasks import standard_tasks
from ipvla.storage import StorageRoots
from ray_jobs.cli import run
from ray_jobs.evaluate import EXPERT, EvaluateConfig, evaluate

SUITES: Final = ("libero_spatial", "libero_object")
_AIM = 0.8


@dataclass(frozen=True)
class ExpertStudy(StorageRoots):
    """What is played.

    Attributes:
        quick: three tasks once each, in a temporary place unless a storage root is given.
        libero_assets: directory of LIBERO's assets; not needed where `ray_jobs.doctor` was told.
        trials: published initial states of each task.
        num_simulators: of the service.
    """

    quick: bool = False
    libero_assets: str | None = None
    trials: int = 50
    num_simulators: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.trials <= 50:
            raise ValueError(f"trials: {self.trials} of 50 published initial states; ask for 1 to 50")


def measure(study: ExpertStudy, suite: str, console: Console) -> dict[str, Any]:
    """By task, and over all of them."""
    names = [task.name for task in standard_tasks(suite)][: 3 if study.quick else None]
    success = SuccessConfig(
        suite=suite, episodes=dict.fromkeys(names, study.trials), num_simulators=study.num_simulators
    )
    roots = {name: getattr(study, name) for name in StorageRoots.__dataclass_fields__}
    config = EvaluateConfig(study=suite, policies=(EXPERT,), success=success, videos=0, **roots)
    (table,) = evaluate(config, console).tables
    return suite_figures(table)


def suite_figures(table: SuccessTable) -> dict[str, Any]:
    """JSON values: `tasks` (row and `steps`, the median of those that succeeded), `all`, `protocol`."""
    steps: dict[str, list[int]] = {row.name: [] for row in table.tasks}
    for result in table.results:
        if result.success:
            steps[result.spec.task].append(result.steps)
    (family,) = table.families
    return {
        "tasks": {
            row.name: {**row.to_dict(), "steps": median(steps[row.name]) if steps[row.name] else None}
            for row in table.tasks
        },
        "all": family.to_dict(),
        "protocol": table.fingerprint["protocol"],
    }


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was aimed at, per suite."""
    return [
        Target(f"expert_{suite}", told["all"]["rate"], _AIM, True, interval=tuple(told["all"]["wilson95"]))
        for suite, told in figures.items()
    ]


def expert_table(figures: Mapping[str, Any]) -> str:
    """Every task with its interval."""
    rows = head("suite", "task", "success", "Wilson 95 %", "control steps, median")
    for suite, told in figures.items():
        for task, row in told["tasks"].items():
            rows.append(
                _row(f"`{suite}`", task.replace("_", " "), row, "" if row["steps"] is None else row["steps"])
            )
        rows.append(_row(f"`{suite}`", "**all**", told["all"], ""))
    return "\n".join(rows)


def _row(suite: str, task: str, row: Mapping[str, Any], steps: object) -> str:
    low, high = row["wilson95"]
    return line(suite, task, f"{row['k']}/{row['n']}", f"{low:.2f}-{high:.2f}", str(steps))


def main(study: ExpertStudy) -> None:
    """Plays, prints, and on a full run records."""
    console = Console()
    if study.quick:
        study = replace(study, trials=1)
    with placed(study, study.quick) as here:
        if here.libero_assets is not None:
            provide_assets(here.cache, here.libero_assets)
        figures = {suite: measure(here, suite, console) for suite in SUITES}
    console.print(Markdown(expert_table(figures)))
    if not study.quick:
        console.print(f"written to {write_record('expert', [], figures, targets(figures))}")


if __name__ == "__main__":
    run(ExpertStudy, main, __doc__)
