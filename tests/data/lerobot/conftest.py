"""Trajectories as LeRobot names them: smooth pictures, so that a video of them loses little."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ipvla.data.lerobot import Layout, VideoSettings
from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.source import Feature, Trajectory

FPS = 10
LENGTHS = (5, 9, 1, 12, 7)
TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZES = {TOP: (64, 96, 3), WRIST: (48, 64, 3)}


def picture(seed: int, t: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """A gradient whose brightness tells the step."""
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    level = 20 * (t % 9) + 10
    return np.stack([level + 60 * x, level + 40 * y, np.full_like(x, 30 * (seed % 7))], -1).astype(np.uint8)


def trajectory(seed: int, length: int) -> Trajectory:
    rng = np.random.default_rng(seed)
    images = {
        name: EncodedPictures(tuple(encode_png(picture(seed, t, shape)) for t in range(length)))
        for name, shape in SIZES.items()
    }
    steps = {
        **images,
        "observation.state": rng.normal(size=(length, 8)).astype(np.float32),
        "action": rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        "next.reward": (np.arange(length) == length - 1).astype(np.float32)[:, None],
        "next.done": (np.arange(length) == length - 1)[:, None],
        "pose": rng.normal(size=(length, 2, 3)),
        "reasoning": tuple(f"PLAN: go, SUBTASK: {t // 3}" for t in range(length)),
        "task": (f"press button {seed % 3}",) * length,
    }
    metadata = {"task": f"task_{seed % 3}", "family": "recall", "seed": seed}
    return Trajectory(steps, f"episode {seed}", metadata)


def layout(video: VideoSettings | None = None) -> Layout:
    features = {
        **{name: Feature("image", shape, "uint8") for name, shape in SIZES.items()},
        "observation.state": Feature("number", (8,), "float32"),
        "action": Feature("number", (7,), "float32"),
        "next.reward": Feature("number", (1,), "float32"),
        "next.done": Feature("number", (1,), "bool"),
        "pose": Feature("number", (2, 3), "float64"),
        "reasoning": Feature("text", (), "str"),
    }
    return Layout(FPS, features, video, "panda")


def trajectories() -> list[Trajectory]:
    return [trajectory(seed, length) for seed, length in enumerate(LENGTHS)]
