"""Reading episodes: pictures per CPU-second, memory and time to the first batch, against TensorFlow's readers.

    python -m benchmarks.data [--tensorflow_python /path/to/python] [--quick true]

- reading: processes of their own decode every picture of one RLDS dataset (JPEG in TFRecord), in turns: ours,
  tfds' `as_dataset`, and dlimp as OpenVLA uses it. Needs a Python with `requirements-oxe.txt`; dlimp is left out
  where it is not installed.
- lanes: memory of a process that trains on windows of whole episodes, over three epochs.
- lookup: where an episode lies, among a million.
- scale: what an epoch of Open X-Embodiment's size asks of object storage and of each worker, from the constants
  that were measured and a plan of that size.

A full run writes `benchmarks/results/data.json`; a quick one means nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from rich.console import Console

from ipvla.data.plan import EpochPlan
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.cli import run
from studies.record import Target, conclude

_ENTRIES = 1_000_000
#: Of every worker: lanes, policy steps per window, control steps per policy step, decoded windows ahead.
_LANES, _WINDOW, _STRIDE, _PREFETCHED = 16, 8, 4, 2


@dataclass(frozen=True)
class DataStudy:
    """What is measured.

    Attributes:
        quick: one turn on a small dataset; writes nothing.
        tensorflow_python: a Python with `requirements-oxe.txt`; None for this one.
        episodes, steps, size: of the dataset; pixels for `size`. Two cameras.
        turns: of every reader.
    """

    quick: bool = False
    tensorflow_python: Path | None = None
    episodes: int = 50
    steps: int = 100
    size: int = 128
    turns: int = 5

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "size", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        python = self.tensorflow_python
        if python is not None and not python.is_file():
            raise ValueError(f"tensorflow_python {python} is no file; give a Python with TensorFlow")

    @property
    def python(self) -> str:
        return str(self.tensorflow_python or sys.executable)


def summary(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over one reader's turns, and the range of the throughput.

    A turn is what a process that does nothing but read took: `first_s`, seconds from its start, imports included,
    to the first whole episode decoded; and of its `epochs` the `pictures` decoded, `cpu_s` of all threads, and
    `rss`, resident bytes at the end. The first epoch, which also builds what is built once, does not count.
    """
    rates = []
    for turn in turns:
        pictures, cpu_s = (sum(epoch[of] for epoch in turn["epochs"][1:]) for of in ("pictures", "cpu_s"))
        rates.append(pictures / cpu_s)
    return {
        "pictures_per_cpu_s": median(rates),
        "least": min(rates),
        "most": max(rates),
        "rss_mb": median(max(epoch["rss"] for epoch in turn["epochs"]) for turn in turns) / 1e6,
        "first_s": median(turn["first_s"] for turn in turns),
    }


def measure_reading(study: DataStudy, directory: Path, console: Console) -> dict[str, dict[str, float]]:
    """By reader's name its `summary`; in every turn each of them once."""
    pythons = {"ipvla": sys.executable, "tfds": study.python, "dlimp": study.python}
    if not _has(study.python, "dlimp"):
        console.print("dlimp is not installed there and is left out")
        del pythons["dlimp"]
    turns: dict[str, list[Any]] = {name: [] for name in pythons}
    for turn in range(1 if study.quick else study.turns):
        for name, python in pythons.items():
            turns[name].append(_output(python, name, directory, 3))
            rate = summary(turns[name][-1:])["pictures_per_cpu_s"]
            console.print(f"turn {turn + 1}, {name}: {rate:.0f} pictures per CPU-second")
    return {name: summary(readings) for name, readings in turns.items()}


def targets(figures: Mapping[str, Any], turns: int) -> list[Target]:
    """What was promised: against the better of the others in each figure."""
    ours = figures["reading"]["ipvla"]
    others = {name: one for name, one in figures["reading"].items() if name != "ipvla"}
    rate, rss, first = (
        ours[of] / best(one[of] for one in others.values())
        for of, best in (("pictures_per_cpu_s", max), ("rss_mb", min), ("first_s", min))
    )
    note = f"medians of {turns} turns, against the better of {' and '.join(others)}"
    return [
        Target("frames_per_cpu_s_ratio", rate, 1.1, True, note=note),
        Target("rss_ratio", rss, 0.2, False),
        Target("first_batch_ratio", first, 0.1, False),
        Target("lookup_us_1m", figures["lookup_us"], 50, False),
    ]


@dataclass(frozen=True)
class Collection:
    """Episodes of log-normal length.

    Attributes:
        episodes: how many.
        median_steps, spread: of the lengths; the spread is the standard deviation of their logarithm.
        cameras: pictures per step.
        pixels: side of a picture.
    """

    episodes: int
    median_steps: float
    spread: float
    cameras: int
    pixels: int


#: About Open X-Embodiment as OpenVLA takes it: a million episodes, most of some tens of steps, some of hundreds.
OXE: Final = Collection(episodes=1_000_000, median_steps=60, spread=0.8, cameras=2, pixels=256)


def at_scale(
    collection: Collection, bytes_per_pixel: float, cpu_s_per_pixel: float, workers: int, rng: np.random.Generator
) -> dict[str, float]:
    """Plans a real epoch of that size, by so many workers of 16 lanes each.

    Args:
        bytes_per_pixel: encoded, with all else in a record.
        cpu_s_per_pixel: to read and decode it.

    Returns:
        terabytes: read from storage, every episode once, in as many ranged `requests`.
        worker_mb: encoded episodes on a worker's lanes, each as long as one in a hundred is, and decoded windows
            ahead.
        cpu_hours: of reading and decoding, all workers together; one step in `_STRIDE` is decoded.
        windows: training steps in the epoch.
        idle_share: of all places in lanes, simulated; they lie at the lanes' ends, and there is no other padding.
        planning_s: CPU seconds in which each worker makes the plan.
    """
    drawn = rng.lognormal(np.log(collection.median_steps), collection.spread, collection.episodes)
    lengths = np.maximum(drawn.astype(np.int64), 1)
    started = time.process_time()
    plan = EpochPlan(lengths, 0, 0, lanes_total=workers * _LANES, window=_WINDOW, stride=_STRIDE)
    planning_s = time.process_time() - started
    area, pictures = collection.pixels**2, int(lengths.sum()) * collection.cameras
    size = bytes_per_pixel * area
    encoded = _LANES * float(np.quantile(lengths, 0.99)) * collection.cameras * size
    decoded = _PREFETCHED * _LANES * _WINDOW * collection.cameras * 3 * area
    return {
        "workers": workers,
        "terabytes": pictures * size / 1e12,
        "requests": collection.episodes,
        "worker_mb": (encoded + decoded) / 1e6,
        "cpu_hours": pictures / _STRIDE * cpu_s_per_pixel * area / 3600,
        "windows": plan.num_windows,
        "idle_share": plan.idle_share,
        "planning_s": planning_s,
    }


def _has(python: str, package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def _output(python: str, *arguments: object) -> Any:
    """What `benchmarks.data_readers` prints last, as JSON."""
    command = [python, "-m", "benchmarks.data_readers", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SOURCE_TREE)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads((done.stdout.splitlines() or ["null"])[-1])


def main(study: DataStudy) -> None:
    """Measures, prints, and on a full run records."""
    console = Console()
    if not _has(study.python, "tensorflow"):
        raise ValueError(
            f"{study.python} has no TensorFlow to compare with; install requirements-oxe.txt in an environment "
            "and give its interpreter as --tensorflow_python"
        )
    episodes, steps = (6, 30) if study.quick else (study.episodes, study.steps)
    with tempfile.TemporaryDirectory() as scratch:
        _output(study.python, "write", scratch, episodes, steps, study.size)
        (directory,) = Path(scratch).glob("*/1.0.0")
        readers = measure_reading(study, directory, console)
        lanes = _output(sys.executable, "lanes", directory)
        lookup_us = _output(sys.executable, "lookup", scratch, _ENTRIES)
        written = sum(path.stat().st_size for path in directory.iterdir() if "tfrecord" in path.name)
    area = study.size**2
    costs = written / (episodes * steps * 2) / area, 1 / readers["ipvla"]["pictures_per_cpu_s"] / area
    scale = [at_scale(OXE, *costs, workers, np.random.default_rng(0)) for workers in (64, 256, 512)]
    figures = {
        "reading": readers,
        "dataset": {"episodes": episodes, "steps": steps, "cameras": 2, "pixels": study.size},
        "lanes_rss_mb": lanes,
        "lookup_us": lookup_us,
        "scale": scale,
    }
    reached = targets(figures, 1 if study.quick else study.turns)
    conclude("data", [0], figures, reached, console, quick=study.quick)


if __name__ == "__main__":
    run(DataStudy, main, __doc__)
