"""What is random in an episode, drawn from its seed alone: layout, cue and phrasing."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ipvla.sim.recall.scene import MIN_DISTANCE_M, WORKSPACE_X_M, WORKSPACE_Y_M
from ipvla.sim.recall.tasks import RecallTask

_SEEDS = 2**32


@dataclass(frozen=True)
class Episode:
    """One draw.

    Attributes:
        seed: in [0, 2^32).
        instruction: one of the task's phrasings.
        cue: index of the button that lights up, None for tasks without a cue.
        positions_m: float64 [objects, 2], x and y relative to the table's centre.
    """

    seed: int
    instruction: str
    cue: int | None
    positions_m: npt.NDArray[np.float64]


def episode_rng(task: RecallTask, seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, so that drawing more of one thing never changes another.

    The task's name takes part: tasks that are collected with the same seeds still see different layouts.
    """
    return np.random.default_rng([seed, zlib.crc32(f"{task.name}/{purpose}".encode())])


def draw_episode(task: RecallTask, seed: int) -> Episode:
    """The task's episode with this seed.

    Raises:
        ValueError: the seed is outside [0, 2^32).
    """
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed {seed} is outside [0, 2^32); take it from Split.TRAIN.seed or Split.HELD_OUT.seed")
    phrasing = int(episode_rng(task, seed, "phrasing").integers(len(task.phrasings)))
    cue = int(episode_rng(task, seed, "cue").integers(len(task.objects))) if task.cue_steps else None
    return Episode(seed, task.phrasings[phrasing], cue, _layout(task, seed))


def _layout(task: RecallTask, seed: int) -> npt.NDArray[np.float64]:
    """Uniform over the layouts in which no two objects are closer than `MIN_DISTANCE_M`."""
    rng = episode_rng(task, seed, "layout")
    low, high = np.transpose([WORKSPACE_X_M, WORKSPACE_Y_M])
    while True:
        positions = rng.uniform(low, high, size=(len(task.objects), 2))
        distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
        if (distances[np.triu_indices(len(positions), k=1)] >= MIN_DISTANCE_M).all():
            return positions
