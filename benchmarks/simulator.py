"""CPU time of the Recall suite per control step, for three rendering habits.

    python -m benchmarks.simulator [--quick]

Replays the expert's episodes at 64 px with one camera, and measures step and observe alone. A full run writes
`benchmarks/results/simulator.json`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.record import Target, write_record
from ipvla.sim.recall.expert import Expert
from ipvla.sim.simulator import Simulator, Split
from ipvla.sim.suites import load_suite

TASKS = ("ground_red", "recall", "count_red2_blue1", "place")
#: Rendering habit -> a picture every so many control steps, 0 for never.
HABITS = {"never": 0, "every 4th step": 4, "every step": 1}
CAMERA_SIZE = 64
BOUND_MS = 8.0


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
        times: dict[str, list[float]] = {habit: [] for habit in HABITS}
        for seed in seeds:
            actions = expert_actions(simulator, seed)
            for habit, every in HABITS.items():
                times[habit].append(cpu_ms_per_step(simulator, seed, actions, every))
        simulator.close()
        for habit in HABITS:
            means[habit].append(statistics.fmean(times[habit]))
    return {
        habit: {"mean": round(statistics.fmean(m), 2), "min": round(min(m), 2), "max": round(max(m), 2)}
        for habit, m in means.items()
    }


def main() -> None:
    """Measures, prints, and on a full run records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds instead of ten; writes nothing")
    quick = parser.parse_args().quick
    seeds = [Split.HELD_OUT.seed(index) for index in range(2 if quick else 10)]
    console = Console()
    with tempfile.TemporaryDirectory() as cache, console.status("replaying expert episodes (about a minute)"):
        figures = measure(Path(cache), seeds)
    table = Table(
        "rendering", "mean", "least task", "most task", title="CPU-ms per control step, 64 px, one camera"
    )
    for habit, values in figures.items():
        table.add_row(habit, *(f"{values[key]:.2f}" for key in ("mean", "min", "max")))
    console.print(table)
    target = Target("cpu_ms_per_step", figures["every step"]["mean"], BOUND_MS, at_least=False)
    console.print(f"target {target.value} <= {target.bound} CPU-ms, rendering every step: met {target.met}")
    if not quick:
        named = {f"CPU-ms per control step, rendering {habit}": values for habit, values in figures.items()}
        console.print(f"written to {write_record('simulator', seeds, named, [target])}")


if __name__ == "__main__":
    main()
