"""docs/data.md, action_tokens.md, ecot.md and models.md: their commands in order, in small."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ipvla.data.lerobot import Layout
from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.source import Feature, Trajectory
from ipvla.storage import SOURCE_TREE
from tests.data.foreign import write_foreign
from tests.data.lerobot.writing import write_lerobot
from tests.data.reasoning import bridge
from tests.journeys.page import commands

DOCS = SOURCE_TREE / "docs"
#: Suites by their public names, and what their metadata call them.
LIBERO = {"goal": "libero_goal", "10": "liber_o10", "spatial": "libero_spatial", "object": "libero_object"}
STEPS = [
    *("--use_gpu", "false", "--num_workers", "1", "--training.precision", "fp32", "--training.steps", "2"),
    *("--training.log_every", "1", "--lanes.lanes", "1", "--lanes.window", "2"),
]
SMALL = {
    "train *qwen_vl*": [*STEPS, "--data.image_size", "56", "--model.backbone.dtype", "float32"],
    "train": STEPS,
    "fit_tokens *rvq*": ["--tokenizer.steps", "20", "--tokenizer.batch", "16"],
}


def page(name: str) -> list[str]:
    return [line for line in commands((DOCS / name).read_text()) if line.startswith("ipvla ")]


def jobs(lines: list[str]) -> list[str]:
    return [line.split()[1] for line in lines]


def pushed(seed: int) -> Trajectory:
    """Of PushT: a picture, a place, where to go."""
    rng = np.random.default_rng(seed)
    states = rng.uniform(0, 512, (13, 2)).astype(np.float32)
    pictures = tuple(encode_png(rng.integers(0, 256, (24, 24, 3), np.uint8)) for _ in range(12))
    steps = {
        "observation.image": EncodedPictures(pictures),
        "observation.state": states[:-1],
        "action": states[1:],
        "task": ("push the T",) * 12,
    }
    return Trajectory(steps, f"episode {seed}", {})


def write_pusht(directory: Path) -> None:
    features = {name: Feature("number", (2,), "float32") for name in ("observation.state", "action")}
    features |= {"observation.image": Feature("image", (24, 24, 3), "uint8")}
    write_lerobot(directory, Layout(10, features, None, "pusht"), map(pushed, range(3)))


def downloads(home: Path) -> None:
    datasets = home / "ipvla_storage" / "datasets"
    for suite, inner in LIBERO.items():
        write_foreign(datasets / f"libero_{suite}_no_noops" / "1.0.0", inner_name=inner)
    bridge.write(datasets)
    bridge.write(home)
    write_pusht(home / "data" / "pusht")
    write_foreign(home / "data" / "mine" / "1.0.0", inner_name="mine", state="joints", joints=False)
