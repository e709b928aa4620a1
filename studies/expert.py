"""Success of the scripted expert on the suites of `studies/expert.yaml`, through the rollout service, per task.

    python -m studies.expert --libero_assets DIRECTORY [--quick true]

Every published initial state, by protocol `openvla`. A full run writes `benchmarks/results/expert.json`; one that
was interrupted goes on where it was, if it gets the same storage root.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.sim.standard.assets import provide_assets
from ipvla.sim.standard.tasks import standard_tasks
from ipvla.storage import StorageRoots
from ray_jobs.command_line.cli import run
from ray_jobs.evaluate import EXPERT, EvaluateConfig, evaluate
from studies.engine import entries, placed
from studies.record import Target, conclude
from studies.tables import study_table


@dataclass(frozen=True)
class ExpertStudy(StorageRoots):
    """What is played.

    Attributes:
        quick: three tasks once each, in a temporary place unless a storage root is given.
        libero_assets: directory of LIBERO's assets; not needed where `ray_jobs.doctor` was given it.
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
    episodes = dict.fromkeys(names, study.trials)
    success = SuccessConfig(suite=suite, episodes=episodes, num_simulators=study.num_simulators)
    roots: dict[str, Any] = {name: getattr(study, name) for name in StorageRoots.__dataclass_fields__}
    config = EvaluateConfig(study=suite, policies=(EXPERT,), success=success, videos=0, **roots)
    (table,) = evaluate(config, console).tables
    return suite_figures(table)


def suite_figures(table: SuccessTable) -> dict[str, Any]:
    """JSON values: `tasks` (row and `steps`, the median of those that succeeded), `all`, `protocol`."""
    tasks = {}
    for row in table.tasks:
        steps = [result.steps for result in table.results if result.success and result.spec.task == row.name]
        tasks[row.name] = {**row.to_dict(), "steps": median(steps) if steps else None}
    (family,) = table.families
    return {"tasks": tasks, "all": family.to_dict(), "protocol": table.fingerprint["protocol"]}


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was aimed at, per suite."""
    aims = entries("expert")
    rates = {suite: row["all"] for suite, row in figures.items()}
    return [
        Target(f"expert_{suite}", row["rate"], aims[suite], True, interval=tuple(row["wilson95"]))
        for suite, row in rates.items()
    ]


def main(study: ExpertStudy) -> None:
    """Plays, prints, and on a full run records."""
    console = Console()
    if study.quick:
        study = replace(study, trials=1)
    with placed(study, study.quick) as here:
        if here.libero_assets is not None:
            provide_assets(here.cache, here.libero_assets)
        figures = {suite: measure(here, suite, console) for suite in entries("expert")}
    console.print(Markdown(study_table(figures, "expert")))
    conclude("expert", [], figures, targets(figures), console, quick=study.quick)


if __name__ == "__main__":
    run(ExpertStudy, main, __doc__)
