"""CPU time of the Recall suite per control step, for three rendering habits.

    python -m benchmarks.simulator [--quick]

Replays the expert's episodes at 64 px with one camera, and measures step and observe alone. A full run, of ten
seeds instead of two, writes `benchmarks/results/simulator.json`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markdown import Markdown

from ipvla.sim.recall.expert import Expert
from ipvla.sim.simulator import Simulator, Split
from ipvla.sim.suites import load_suite
from ray_jobs.command_line.cli import run
from studies.record import Target, conclude
from studies.tables import study_table

TASKS = ("ground_red", "recall", "count_red2_blue1", "place")
#: Rendering habit -> a picture every so many control steps, 0 for never.
HABITS = {"never": 0, "every 4th step": 4, "every step": 1}
CAMERA_SIZE = 64
BOUND_MS = 8.0


@dataclass(frozen=True)
class SimulatorStudy:
    """What is measured.

    Attributes:
        quick: two seeds instead of ten; writes nothing.
    """

    quick: bool = False


def expert_actions(simulator: Simulator, seed: int) -> list[npt.NDArray[np.float64]]:
    """The actions of one episode, so that the expert's own time is not measured."""
    simulator.reset(seed)
    expert = Expert(simulator, np.random.default_rng(seed))
    actions: list[npt.NDArray[np.float64]] = []
    while len(actions) < simulator.task.horizon:
        actions.append(expert.act())
        if simulator.step(actions[-1]).done:
            break
    return actions


def cpu_ms_per_step(simulator: Simulator, seed: int, actions: list[npt.NDArray[np.float64]], every: int) -> float:
    """CPU milliseconds of this process, all threads, per control step of the episode."""
    simulator.reset(seed)
    started = time.process_time()
    for t, action in enumerate(actions):
        if every and t % every == 0:
            simulator.observe()
        simulator.step(action)
    return (time.process_time() - started) * 1e3 / len(actions)


def measure(cache_dir: Path, seeds: list[int]) -> dict[str, dict[str, float]]:
    """Rendering habit -> mean, least and largest of the tasks' mean CPU-ms per control step."""
    suite = load_suite("recall", cache_dir)
    means: dict[str, list[float]] = {habit: [] for habit in HABITS}
    for task in TASKS:
        simulator = suite.simulator(task, CAMERA_SIZE)
        cpu_ms_per_step(simulator, 0, expert_actions(simulator, 0), every=1)  # warm up
        played = [(seed, expert_actions(simulator, seed)) for seed in seeds]
        times = [[cpu_ms_per_step(simulator, *one, every) for every in HABITS.values()] for one in played]
        simulator.close()
        for habit, ms in zip(HABITS, zip(*times, strict=True), strict=True):
            means[habit].append(fmean(ms))
    return {
        f"CPU-ms per control step, rendering {habit}": {
            "mean": round(fmean(ms), 2),
            "min": round(min(ms), 2),
            "max": round(max(ms), 2),
        }
        for habit, ms in means.items()
    }


def main(study: SimulatorStudy) -> None:
    """Measures, prints, and on a full run records."""
    seeds = [Split.HELD_OUT.seed(index) for index in range(2 if study.quick else 10)]
    console = Console()
    with TemporaryDirectory() as cache, console.status("replaying expert episodes (about a minute)"):
        figures = measure(Path(cache), seeds)
    mean = figures["CPU-ms per control step, rendering every step"]["mean"]
    target = Target("cpu_ms_per_step", mean, BOUND_MS, at_least=False)
    console.print(Markdown(study_table(figures, "figures")))
    conclude("simulator", seeds, figures, [target], console, quick=study.quick)


if __name__ == "__main__":
    run(SimulatorStudy, main, __doc__)
