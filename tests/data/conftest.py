"""Synthetic episodes: random frames, states and actions with the shapes of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from ipvla.data.conventions import Conventions
from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.rlds import write_rlds
from ipvla.data.statistics import Statistics
from ipvla.data.transforms import PromptEncoder, Transforms
from ipvla.types import Episode

SIZE = 16
LENGTHS = (5, 17, 9, 30, 12, 1, 22)


def random_episode(seed: int, length: int, cameras: tuple[str, ...] = ("agentview",)) -> Episode:
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    action[:, 3:6] = 0
    action[:, 6] = rng.choice([-1, 1], length)
    return Episode(
        task=f"task_{seed % 3}",
        family="ground" if seed % 2 else "recall",
        instruction=f"press button {seed % 3}",
        seed=seed,
        images={camera: rng.integers(0, 256, (length, SIZE, SIZE, 3), dtype=np.uint8) for camera in cameras},
        state=rng.normal(size=(length, 8)).astype(np.float32),
        action=action,
        reasoning=tuple(f"PLAN: press {seed % 3} SUBTASK: {t // 4} press" for t in range(length)),
    )


@pytest.fixture(scope="session")
def episodes() -> list[Episode]:
    return [random_episode(seed, length) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, episodes: list[Episode]) -> Path:
    """A dataset directory that no test may change."""
    return write_rlds(tmp_path_factory.mktemp("data"), "synthetic", episodes, SIZE)


@pytest.fixture
def dataset(written: Path) -> EpisodeDataset:
    return open_dataset(written)


@pytest.fixture
def make_transforms(dataset: EpisodeDataset) -> Callable[..., Transforms]:
    def make(statistics: Statistics | None = None, **changes: object) -> Transforms:
        values: dict[str, object] = {
            "statistics": statistics or dataset.statistics(),
            "tokenize": lambda text: [len(word) for word in text.split()],
            "max_prompt_tokens": 6,
            "cameras": ("agentview",),
            "image_size": SIZE,
            "chunk": 4,
        }
        values |= changes
        prompts = {f.name: values.pop(f.name) for f in fields(PromptEncoder) if f.name in values}
        return Transforms(Conventions(**values), PromptEncoder(**prompts))  # type: ignore[arg-type]

    return make
