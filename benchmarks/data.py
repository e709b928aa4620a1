"""Reading episodes: pictures per CPU-second, memory and time to the first batch, against TensorFlow's readers.

    python -m benchmarks.data [--tensorflow_python /path/to/python] [--quick true]

- reading: processes of their own decode every picture of one RLDS dataset (JPEG in TFRecord), in turns: ours,
  tfds' `as_dataset`, and dlimp as OpenVLA uses it. Needs a Python with `requirements-oxe.txt`; dlimp is left out
  where it is not installed.
- lanes: memory of a process that trains on windows of whole episodes, over three epochs.
- lookup: where an episode lies, among a million.
- scale: what an epoch of Open X-Embodiment's size asks of object storage and of each worker, from the constants
  that were measured and a plan of that size (`data_scale`).

A full run writes `benchmarks/results/data.json`; a quick one means nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import draccus
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.data_reading import Epoch, Reading
from benchmarks.data_scale import OXE, Constants, Scale, at_scale
from benchmarks.record import Target, write_record
from benchmarks.tables import target_rows
from ray_jobs.command_line.cli import run

_TENSORFLOW = Path(__file__).with_name("data_tensorflow.py")
_ENTRIES = 1_000_000


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
        if self.tensorflow_python is not None and not self.tensorflow_python.is_file():
            raise ValueError(
                f"tensorflow_python {self.tensorflow_python} is no file; give a Python with TensorFlow"
            )

    @property
    def python(self) -> str:
        return str(self.tensorflow_python or sys.executable)


@dataclass(frozen=True)
class Rival:
    """One reader's turns."""

    turns: tuple[Reading, ...]

    @property
    def pictures_per_cpu_s(self) -> float:
        return median(turn.pictures_per_cpu_s for turn in self.turns)

    @property
    def rss(self) -> float:
        return median(turn.rss for turn in self.turns)

    @property
    def first_s(self) -> float:
        return median(turn.first_s for turn in self.turns)

    def to_dict(self) -> dict[str, float]:
        """Medians over turns, and the range of the throughput."""
        rates = [turn.pictures_per_cpu_s for turn in self.turns]
        return {
            "pictures_per_cpu_s": self.pictures_per_cpu_s,
            "least": min(rates),
            "most": max(rates),
            "rss_mb": self.rss / 1e6,
            "first_s": self.first_s,
        }


def measure_reading(study: DataStudy, directory: Path, console: Console) -> dict[str, Rival]:
    """By reader's name; in every turn each of them once."""
    commands = {
        "ipvla": [sys.executable, "-m", "benchmarks.data_reading"],
        "tfds": [study.python, str(_TENSORFLOW), "tfds"],
        "dlimp": [study.python, str(_TENSORFLOW), "dlimp"],
    }
    if not _has(study.python, "dlimp"):
        console.print("dlimp is not installed there and is left out")
        del commands["dlimp"]
    turns: dict[str, list[Reading]] = {name: [] for name in commands}
    for turn in range(1 if study.quick else study.turns):
        for name, command in commands.items():
            told = json.loads(_output([*command, str(directory), "3"]).splitlines()[-1])
            turns[name].append(Reading(told["first_s"], tuple(Epoch(**epoch) for epoch in told["epochs"])))
            console.print(
                f"turn {turn + 1}, {name}: {turns[name][-1].pictures_per_cpu_s:.0f} pictures per CPU-second"
            )
    return {name: Rival(tuple(readings)) for name, readings in turns.items()}


def measure_lanes(directory: Path) -> list[float]:
    """Resident MB of a process of its own after each of three epochs of windows."""
    told: list[float] = json.loads(_output([sys.executable, "-m", "benchmarks.data_lanes", str(directory)]))
    return told


def measure_lookup(scratch: Path) -> float:
    """Microseconds to find an episode among a million in an index on disk, median of 20,000 at random."""
    told: float = json.loads(
        _output([sys.executable, "-m", "benchmarks.data_lookup", str(scratch), str(_ENTRIES)])
    )
    return told


def targets(readers: Mapping[str, Rival], lookup_us: float) -> list[Target]:
    """What was promised: against the better of the others in each figure."""
    ours, others = readers["ipvla"], [rival for name, rival in readers.items() if name != "ipvla"]
    named = " and ".join(name for name in readers if name != "ipvla")
    best = max(rival.pictures_per_cpu_s for rival in others)
    return [
        Target(
            "frames_per_cpu_s_ratio",
            ours.pictures_per_cpu_s / best,
            1.1,
            True,
            note=f"medians of {len(ours.turns)} turns, against the better of {named}",
        ),
        Target("rss_ratio", ours.rss / min(rival.rss for rival in others), 0.2, False),
        Target("first_batch_ratio", ours.first_s / min(rival.first_s for rival in others), 0.1, False),
        Target("lookup_us_1m", lookup_us, 50, False),
    ]


def _scale(readers: Mapping[str, Rival], directory: Path, pictures: int, pixels: int) -> Sequence[Scale]:
    size = sum(path.stat().st_size for path in directory.iterdir() if "tfrecord" in path.name)
    constants = Constants(
        bytes_per_picture=size / pictures,
        cpu_s_per_picture=1 / readers["ipvla"].pictures_per_cpu_s,
        pixels=pixels,
    )
    return [at_scale(OXE, constants, workers, np.random.default_rng(0)) for workers in (64, 256, 512)]


def _has(python: str, package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


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
        root = Path(scratch)
        _output([study.python, str(_TENSORFLOW), "write", str(root), *map(str, (episodes, steps, study.size))])
        (directory,) = root.glob("*/1.0.0")
        readers = measure_reading(study, directory, console)
        lanes = measure_lanes(directory)
        lookup_us = measure_lookup(root)
        scale = _scale(readers, directory, episodes * steps * 2, study.size)
    figures = {
        "reading": {name: rival.to_dict() for name, rival in readers.items()},
        "dataset": {"episodes": episodes, "steps": steps, "cameras": 2, "pixels": study.size},
        "lanes_rss_mb": lanes,
        "lookup_us": lookup_us,
        "scale": [draccus.encode(one) for one in scale],
    }
    reached = targets(readers, lookup_us)
    console.print(Markdown("\n".join(target_rows([target.to_dict() for target in reached]))))
    if not study.quick:
        console.print(f"written to {write_record('data', [0], figures, reached)}")


if __name__ == "__main__":
    run(DataStudy, main, __doc__)
