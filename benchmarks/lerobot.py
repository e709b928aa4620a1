"""LeRobot's evaluation loop against `ray_jobs.evaluate`: same tasks, initial states, actions and machine.

    make lerobot                             # once: LeRobot in an environment of its own, .venv/lerobot
    python -m benchmarks.lerobot [--lerobot_python PATH] [--quick]

Both play the first tasks of a suite of LIBERO's from its published initial states with a policy that answers with
recorded actions and takes no time, to the step limit, by LeRobot's own rules (protocol `lerobot`), without videos.
LeRobot's side (`benchmarks/lerobot_side.py`) makes its environments and its loop with its own functions, ours is
`ray_jobs.evaluate` with all that belongs to it (journal, report, MLflow). Every run is a process of its own; the
sides take turns, so that whatever else slows the machine slows all of them.

CPU time is that of all processes of a run, read from the system four times a second. A short run before the
measured ones keeps what both policies see, which is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console

from ipvla.sim.environment import gl_environment
from ipvla.sim.protocols import load_protocol
from ipvla.sim.standard.assets import find_assets
from ipvla.sim.standard.tasks import standard_tasks
from ipvla.storage import SOURCE_TREE, StorageRoots
from ray_jobs.command_line.cli import run
from studies.engine import placed
from studies.record import Figures, Target, conclude

_PROFILES: Final = ("exact", "fast")
_SAMPLE_EVERY_S: Final = 0.25
_SUITE: Final = "libero_object"
_PROTOCOL: Final = load_protocol("lerobot")


class LerobotError(ValueError):
    """LeRobot's environment is not there, or a side failed."""


@dataclass(frozen=True)
class LerobotStudy(StorageRoots):
    """What is played.

    Attributes:
        quick: one round of a few steps, in a temporary place unless a storage root is given; results mean nothing.
        lerobot_python: the interpreter that has LeRobot.
        rounds: of a run of each side.
        tasks: of the suite's first ones.
        trials: per task and run.
        steps: control steps of an episode.
        execute: actions of a chunk, all of which are played.
        lerobot_simulators: `eval.batch_size`, in processes of their own if more than one (`eval.use_async_envs`);
            LeRobot itself chooses 1 on two cores.
        lerobot_threads: that OpenGL and BLAS may use per process on LeRobot's side; 0 for as many as they like.
        lerobot_hard_reset: whether LeRobot builds the world anew for every episode, as it does by default.
        num_simulators: of ours; None for as many as it finds by itself.
    """

    quick: bool = False
    lerobot_python: Path = SOURCE_TREE / ".venv" / "lerobot" / "bin" / "python"
    rounds: int = 3
    tasks: int = 2
    trials: int = 6
    steps: int = 120
    execute: int = 10
    lerobot_simulators: int = 1
    lerobot_threads: int = 1
    lerobot_hard_reset: bool = True
    num_simulators: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "tasks", "trials", "steps", "execute", "lerobot_simulators", "num_simulators"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.steps % self.execute:
            raise ValueError(f"steps is {self.steps}; give a multiple of execute, {self.execute}")
        if self.trials % self.lerobot_simulators:
            raise ValueError(
                f"trials is {self.trials}; give a multiple of lerobot_simulators, {self.lerobot_simulators}: "
                "LeRobot plays whole batches"
            )

    @property
    def episodes(self) -> int:
        """Of a run."""
        return self.tasks * self.trials


class CpuClock(threading.Thread):
    """Reads the CPU time of this process's descendants, and of the machine, from `start` to `stop`.

    A process that ends loses what it did since it was last read, a quarter of a second at most.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._spent: dict[tuple[int, float], float] = {}
        self._times: list[float] = []
        self._read: list[float] = []

    def run(self) -> None:
        """Until `stop`."""
        while True:
            self._sample()
            if self._ended.wait(_SAMPLE_EVERY_S):
                return

    def stop(self) -> None:
        """A last reading."""
        self._ended.set()
        self.join()
        self._sample()

    def between(self, began: float, ended: float) -> float:
        """CPU seconds between two readings of `time.time`."""
        first, last = np.interp([began, ended], self._times, self._read)
        return float(last - first)

    @property
    def total(self) -> float:
        """CPU seconds of all."""
        return self._read[-1] - self._read[0]

    def _sample(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                times, key = process.cpu_times(), (process.pid, process.create_time())
            except psutil.Error:  # it has ended
                continue
            self._spent[key] = max(self._spent.get(key, 0.0), times.user + times.system)
        self._times.append(time.time())
        self._read.append(sum(self._spent.values()))


def recorded_actions(steps: int) -> npt.NDArray[np.float32]:
    """Float32 [steps, 7]: the hand swings about its place with the gripper open, so no task is done."""
    t = np.arange(steps)[:, None]
    hand = 0.3 * np.sin(2 * np.pi * t / np.array([40, 50, 60, 70, 80, 90]))
    return np.concatenate([hand, np.full((steps, 1), -1.0)], axis=1).astype(np.float32)


def require_lerobot(study: LerobotStudy, assets: Path) -> Path:
    """LIBERO's settings file for LeRobot's side, whose hf-libero gets these assets.

    Raises:
        LerobotError: the interpreter is not there or has no LeRobot, or its hf-libero has other assets.
    """
    find = (
        "import importlib.metadata, importlib.util; importlib.metadata.version('lerobot'); "
        "print(importlib.util.find_spec('libero').submodule_search_locations[0])"
    )
    if not study.lerobot_python.exists():
        raise LerobotError(f"lerobot_python: there is no {study.lerobot_python}; run make lerobot")
    found = subprocess.run([study.lerobot_python, "-c", find], capture_output=True, text=True, check=False)
    if found.returncode:
        raise LerobotError(f"lerobot_python: {study.lerobot_python} has no LeRobot with LIBERO; run make lerobot")
    package = Path(found.stdout.strip()) / "libero"
    link = package / "assets"
    if not link.exists():
        link.symlink_to(assets)
    if link.resolve() != assets.resolve():
        raise LerobotError(f"{link} leads to other assets than ours in {assets}; remove it and run this again")
    settings = study.runs / "lerobot" / "libero" / "config.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    places = {"benchmark_root": ".", "bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
    lines = [f"{name}: {package / place}\n" for name, place in {**places, "datasets": "../datasets"}.items()]
    settings.write_text("".join(lines))
    return settings


def play(study: LerobotStudy, side: str, name: str, settings: Path, seen: Path | None = None) -> dict[str, Any]:
    """One run of a side ("lerobot", or a profile of ours).

    Args:
        name: of the run, a new one.
        settings: see `require_lerobot`.
        seen: gets what the policy sees; None to keep nothing.

    Returns:
        wall_s, cpu_s: of the whole run, from its start to its end.
        play_wall_s, play_cpu_s: without imports and loading the policy; simulators' start is within.
        others: cores that other processes kept busy meanwhile.
        told: what the side says.
    """
    directory = study.runs / "lerobot" / name
    recorded = directory / "recorded"  # nothing else may lie in it: its files are the policy
    recorded.mkdir(parents=True)
    np.save(recorded / "actions.npy", recorded_actions(study.steps))
    ours, tasks = side in _PROFILES, [task.name for task in standard_tasks(_SUITE)[: study.tasks]]
    result, work = directory / "result.json", directory / "work.json"
    told = {
        **{"suite": _SUITE, "tasks": tasks, "task_ids": list(range(study.tasks)), "profile": side},
        **{"trials": study.trials, "steps": study.steps, "execute": study.execute, "seen": str(seen or "")},
        "simulators": study.num_simulators if ours else study.lerobot_simulators,
        "hard_reset": study.lerobot_hard_reset,
        "picture_px": _PROTOCOL.render_size,
        "actions": str(recorded / "actions.npy"),
        "result": str(result),
        "name": name,
        **{"storage_root": str(study.root), "cache_dir": str(study.cache)},
    }
    work.write_text(json.dumps(told))
    python = Path(sys.executable) if ours else study.lerobot_python
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_TREE), **gl_environment(), "CUDA_VISIBLE_DEVICES": ""}
    if not ours:
        environment |= {"LIBERO_CONFIG_PATH": str(settings.parent), "HF_HUB_OFFLINE": "1"}
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")
        environment |= dict.fromkeys(threads if study.lerobot_threads else (), str(study.lerobot_threads))
    module = f"benchmarks.lerobot_{'ours' if ours else 'side'}"
    clock, machine, began = CpuClock(), _machine_cpu_s(), time.perf_counter()
    clock.start()
    with (directory / "log.txt").open("w") as log:
        done = subprocess.run(
            [python, "-m", module, work], cwd=SOURCE_TREE, env=environment, stdout=log, stderr=log, check=False
        )
    wall_s = time.perf_counter() - began
    clock.stop()
    if done.returncode:
        raise LerobotError(f"{side} ended with code {done.returncode}; its output is in {directory / 'log.txt'}")
    said = json.loads(result.read_text())
    if said["episodes"] != study.episodes:
        raise LerobotError(f"{side} played {said['episodes']} episodes of {study.episodes}; see {directory}")
    return {
        **{"wall_s": wall_s, "cpu_s": clock.total, "play_wall_s": said["ended"] - said["began"]},
        "play_cpu_s": clock.between(said["began"], said["ended"]),
        "others": (_machine_cpu_s() - machine - clock.total) / wall_s,
        "told": said,
    }


def _machine_cpu_s() -> float:
    """CPU seconds that the machine was busy since it started."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


def differences(seen: Mapping[str, Path]) -> Figures:
    """How far what LeRobot's policy sees is from what ours sees: largest distances over all calls.

    Returns:
        observations: that both saw.
        hand_mm: of the hand's positions.
        pictures: profile -> largest mean difference of a picture, levels of 255.

    Raises:
        LerobotError: a side saw an episode or a control step that the other did not.
    """
    names = {side: {file.name for file in directory.glob("*.npz")} for side, directory in seen.items()}
    if len(set(map(frozenset, names.values()))) > 1 or not names["lerobot"]:
        raise LerobotError(f"the sides saw different control steps: {names}")
    hand_mm, levels = 0.0, dict.fromkeys(_PROFILES, 0.0)
    for name in names["lerobot"]:
        with np.load(seen["lerobot"] / name) as theirs:
            for profile in _PROFILES:
                with np.load(seen[profile] / name) as mine:
                    apart = np.linalg.norm(theirs["state"][:3] - mine["state"][:3])
                    hand_mm = max(hand_mm, 1e3 * float(apart))
                    for picture in ("image", "image2"):
                        unlike = np.abs(theirs[picture].astype(int) - mine[picture].astype(int)).mean()
                        levels[profile] = max(levels[profile], float(unlike))
    return {"observations": len(names["lerobot"]), "hand_mm": hand_mm, "pictures": levels}


def measure(study: LerobotStudy, console: Console) -> Figures:
    """The figures of all rounds, after a short run of each side that is compared."""
    settings = require_lerobot(study, find_assets(study.cache))
    sides = ("lerobot", *_PROFILES)
    short = replace(study, steps=3 * study.execute, trials=study.lerobot_simulators)
    stamp = f"{time.time():.0f}"
    seen = {side: study.runs / "lerobot" / f"{stamp}_{side}_seen" for side in sides}
    for side, directory in seen.items():
        directory.mkdir(parents=True)
        play(short, side, f"{stamp}_{side}", settings, directory)
    same = differences(seen)
    console.print(f"both sides see the same: {same}")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    versions: dict[str, str] = {}
    for number in range(study.rounds):
        for side in sides:
            played = play(study, side, f"{stamp}_{side}_{number}", settings)
            versions |= played.pop("told").get("versions", {})
            runs[side].append(played)
            console.print(f"round {number + 1} of {study.rounds}, {side}: {played}")
    told = {name: value for name, value in asdict(study).items() if name not in asdict(StorageRoots())}
    del told["quick"], told["lerobot_python"]
    return {
        "sides": runs,
        "study": {**told, "suite": _SUITE, "picture_px": _PROTOCOL.render_size, "protocol": str(_PROTOCOL)},
        "lerobot": versions,
        "same": same,
        "cores": len(os.sched_getaffinity(0)),
    }


def speedups(figures: Mapping[str, Any], profile: str, of: str) -> list[float]:
    """By round, LeRobot's seconds for ours: `of` is wall_s, cpu_s, play_wall_s or play_cpu_s."""
    runs = figures["sides"]
    return [theirs[of] / mine[of] for theirs, mine in zip(runs["lerobot"], runs[profile], strict=True)]


def targets(figures: Figures) -> list[Target]:
    """A ratio is the median over rounds, its interval the smallest and the largest round's."""
    wall, cpu = speedups(figures, "exact", "wall_s"), speedups(figures, "exact", "cpu_s")
    note = (
        f"episodes per hour of whole runs, start to end, profile exact; by CPU time {median(cpu):.2f} "
        f"({min(cpu):.2f} to {max(cpu):.2f})"
    )
    return [Target("speedup_over_lerobot", median(wall), 3.0, True, interval=(min(wall), max(wall)), note=note)]


def main(study: LerobotStudy) -> None:
    """Measures, prints, and on a full run records."""
    console = Console()
    if study.quick:
        study = replace(study, rounds=1, tasks=1, trials=study.lerobot_simulators, steps=2 * study.execute)
    with placed(study, study.quick) as here:
        figures = measure(here, console)
    conclude("lerobot", (), figures, targets(figures), console, quick=study.quick)


if __name__ == "__main__":
    run(LerobotStudy, main, __doc__)
