"""Fixtures for every room: a small experiment on synthetic demonstrations, a small PaliGemma, a small OpenVLA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ipvla.data.lanes import LaneConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.backbones import TinyConfig, random_prismatic
from ipvla.models.backbones.random_paligemma import SMALLEST, save_random_paligemma
from ipvla.models.heads import RegressionConfig
from ipvla.models.memory import GRUMemoryConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.training.loop import TrainingConfig
from ipvla.training.step import OptimizerConfig
from ipvla.types import Episode

SIZE = 16


def cue_episode(seed: int) -> Episode:
    """The first two frames are bright or dark and every action of the episode says which: only memory can know."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(12, 20))
    bright = rng.random() < 0.5
    images = np.full((length, SIZE, SIZE, 3), 100, np.uint8)
    images[:2] = 220 if bright else 20
    action = np.zeros((length, 7), np.float32)
    action[:, 0] = 0.8 if bright else -0.8
    state = np.zeros((length, 8), np.float32)  # nothing else may tell episodes apart
    colour = "white" if bright else "gray"
    reasoning = (f"PLAN: press {colour} SUBTASK: 1 press {colour}",) * length
    return Episode("cue", "recall", "press the button", seed, {"agentview": images}, state, action, reasoning)


def even_episode(seed: int, length: int = 12) -> Episode:
    """All of one length: windows can be full everywhere, and then means of them weigh as much as their frames."""
    long = cue_episode(seed)
    return replace(
        long,
        images={camera: frames[:length] for camera, frames in long.images.items()},
        state=long.state[:length],
        action=long.action[:length],
        reasoning=long.reasoning[:length],
    )


@pytest.fixture(scope="session")
def storage_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    write_rlds(root / "datasets", "cue", [cue_episode(seed) for seed in range(24)], SIZE)
    return root


@pytest.fixture
def make_experiment(storage_root: Path, tmp_path: Path) -> Callable[..., ExperimentConfig]:
    def make(**changes: object) -> ExperimentConfig:
        values: dict[str, object] = {
            "storage_root": storage_root,
            "run_root_dir": tmp_path / "runs",
            "data": DataConfig(dataset="cue", image_size=SIZE),
            "lanes": LaneConfig(lanes=4, window=6, stride=2),
            "model": IPVLAConfig(
                backbone=TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8),
                memory=GRUMemoryConfig(hidden=16),
                head=RegressionConfig(hidden=32, loss="mse"),
                chunk=2,
            ),
            "optimizer": OptimizerConfig(lr=3e-3, warmup_steps=5),
            "training": TrainingConfig(steps=8, precision="fp32", log_every=2, checkpoint_every=3),
        }
        return ExperimentConfig(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def paligemma_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest PaliGemma: 6 + 2 layers, 4 image tokens per 28-pixel view."""
    directory = tmp_path_factory.mktemp("paligemma")
    words = "what action should the robot take to press red blue button ? which is lit"
    save_random_paligemma(directory, SMALLEST, words.split())
    return directory


@pytest.fixture(scope="session")
def prismatic_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest OpenVLA: 6 layers, two towers of 2 blocks, 4 patches per 28-pixel view."""
    directory = tmp_path_factory.mktemp("prismatic")
    words = "what action should the robot take to press red blue button ? which is lit in : out plan subtask 1"
    random_prismatic.save_random_prismatic(directory, random_prismatic.SMALLEST, words.split())
    return directory
