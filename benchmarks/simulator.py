"""CPU time of the Recall suite per control step, for three rendering habits.

    python -m benchmarks.simulator [--quick]

Replays the expert's episodes at 64 px with one camera, and measures step and observe alone. A full run writes
`benchmarks/results/simulator.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ipvla.sim.fingerprint import fingerprint
from ipvla.sim.recall.expert import Expert
from ipvla.sim.simulator import Simulator, Split
from ipvla.sim.suites import load_suite

RESULTS = Path(__file__).parent / "results" / "simulator.json"
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


def record(figures: dict[str, dict[str, float]], seeds: list[int]) -> dict[str, object]:
    """The JSON record of a run."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    )
    value = figures["every step"]["mean"]
    return {
        "commit": commit.stdout.strip() or "none",
        "machine": {"cpu": cpu_name(), "system": platform.platform(), **fingerprint()},
        "seeds": seeds,
        "figures": {f"CPU-ms per control step, rendering {habit}": values for habit, values in figures.items()},
        "targets": [
            {
                "name": "CPU-ms per control step at 64 px, one camera, every step",
                "value": value,
                "bound": BOUND_MS,
                "met": value <= BOUND_MS,
            }
        ],
    }


def cpu_name() -> str:
    """The processor's model name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


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
    result = record(figures, seeds)
    for target in result["targets"]:  # type: ignore[attr-defined]
        console.print(f"target {target['name']}: {target['value']} <= {target['bound']}: {target['met']}")
    if not quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
