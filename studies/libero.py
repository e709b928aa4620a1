"""A policy learns LIBERO from nothing: demonstrations, trainings, published initial states, by protocol `ipvla`.

    python -m studies.libero [--suites "[object]"] [--seeds "[0]"] [--quick]

Suites are those of `studies/libero.yaml`. Needs the original assets (`make assets`). A full run writes
`benchmarks/results/libero.json`; one that was interrupted goes on where it was, if it gets the same storage root.
`--quick` trains one seed for a few steps on two tasks, plays each once, and writes nothing.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from evaluators.intervals import wilson_interval
from ipvla.sim.standard.tasks import HORIZONS, PRO_ROOT, bddl_file, initial_states, standard_tasks
from ipvla.storage import SOURCE_TREE, StorageRoots
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.running.cluster import connect
from studies.engine import Runner, entries, placed
from studies.expert import suite_figures
from studies.record import Figures, Target, conclude

_MEASURE = """
import sys
from pathlib import Path
import psutil
from ipvla.sim.suites import load_suite
suite = load_suite("libero_10", Path(sys.argv[1]))
simulator = suite.simulator(suite.tasks[0].name, 256)
simulator.observe()
print(psutil.Process().memory_info().rss / 2**30)
"""


@dataclass(frozen=True)
class LiberoStudy(StorageRoots):
    """What is trained and played.

    Attributes:
        quick: everything in small, in a temporary place unless a storage root is given; results mean nothing.
        suites: of `studies/libero.yaml`.
        seeds: of the trainings.
    """

    quick: bool = False
    suites: tuple[str, ...] = ("object",)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.suites) - set(entries("libero"))):
            raise ValueError(f"suites: {', '.join(unknown)}; choose among {', '.join(entries('libero'))}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; give at least one, all different")

    @property
    def training_seeds(self) -> tuple[int, ...]:
        return self.seeds[:1] if self.quick else self.seeds

    def preset(self, suite: str, job: str) -> list[str]:
        """The command line of a job by its preset, in this study's directories."""
        path = SOURCE_TREE / "ray_jobs" / "experiments" / "libero" / suite / ("quick" if self.quick else "")
        return ["--config_path", str(path / f"{job}.yaml"), *arguments(self.directories)]


def measure(study: LiberoStudy, suite: str, console: Console) -> Figures:
    """Collects, trains and plays what is missing of one suite."""
    names = [f"seed{seed}" for seed in study.training_seeds]
    played = parse(EvaluateConfig, [*study.preset(suite, "evaluate"), *arguments({"policies": names})])
    runner = Runner(study.runs / played.study, console)
    runner.collect([parse(CollectConfig, study.preset(suite, "collect"))])
    numbers = {
        name: {"name": name, "seed": seed, "lanes.seed": seed}
        for name, seed in zip(names, study.training_seeds, strict=True)
    }
    runs = {name: [*study.preset(suite, "train"), *arguments(values)] for name, values in numbers.items()}
    trained = runner.train(f"trainings on {suite}", runs)
    with runner.stage("published initial states"):
        tables = evaluate(played, console).tables
    successes, episodes = (
        sum(getattr(row, of) for table in tables for row in table.families) for of in ("k", "n")
    )
    return {
        "success": {table.policy: suite_figures(table)["tasks"] for table in tables},
        "all": {"k": successes, "n": episodes, "wilson95": list(wilson_interval(successes, episodes))},
        "train": {
            name: {"wall_s": summary.wall_s, "loss": summary.final_loss} for name, summary in trained.items()
        },
        "protocol": tables[0].fingerprint["protocol"],
    }


def assets_equal() -> float:
    """Share of LIBERO's tasks whose task file and initial states are the same in hf-libero and LIBERO-PRO."""
    same = []
    for suite in HORIZONS:
        for task in (task.name for task in standard_tasks(suite)):
            bddl = PRO_ROOT / "bddl_files" / suite / f"{task}.bddl"
            with np.load(PRO_ROOT / "init_files" / suite / f"{task}.pruned_init.npz") as stored:
                equal = np.array_equal(stored["states"], initial_states(suite, task))
            same.append(equal and bddl.read_bytes() == bddl_file(suite, task).read_bytes())
    return sum(same) / len(same)


def rss_gib(cache: Path) -> float:
    """Resident memory of a process with the largest of LIBERO's worlds, original textures."""
    command = [sys.executable, "-c", _MEASURE, str(cache)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def targets(figures: Figures) -> list[Target]:
    """What was aimed at."""
    met: list[Target] = [
        Target("assets_equal", figures["assets_equal"], 1.0, True),
        Target("rss_gib_per_simulator", figures["rss_gib_per_simulator"], 1.6, False),
    ]
    for suite, bound in entries("libero").items():
        of: dict[str, Any] | None = figures["suites"].get(suite)
        rate = None if of is None else of["all"]["k"] / of["all"]["n"]
        interval = None if of is None else tuple(of["all"]["wilson95"])
        met.append(Target(f"libero_{suite}_success", rate, bound, True, interval=interval))
    return met


def main(study: LiberoStudy) -> None:
    """Runs what is missing, prints, and on a full run records."""
    console = Console()
    with placed(study, study.quick) as here, connect(here):
        suites = {suite: measure(here, suite, console) for suite in here.suites}
        figures = {"suites": suites, "assets_equal": assets_equal(), "rss_gib_per_simulator": rss_gib(here.cache)}
    conclude("libero", study.training_seeds, figures, targets(figures), console, quick=study.quick)


if __name__ == "__main__":
    run(LiberoStudy, main, __doc__)
