"""Objects that change places: where each of them is at any time of an episode. Plain geometry, no physics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from ipvla.sim.recall.scene import SWAP_CLEARANCE_M, SWAP_PASSING_M
from ipvla.sim.recall.tasks import RecallTask

Positions = npt.NDArray[np.float64]
Swaps = Sequence[tuple[int, int]]

_CHECKED_PHASES = np.linspace(0.0, 1.0, 33)


def places(task: RecallTask, swaps: Swaps, t: int) -> tuple[int, ...]:
    """For each object, whose first place it is in after the swaps that have ended by control step `t`."""
    ends = (task.swap_start(i) + task.swap_steps for i in range(len(swaps)))
    return _places(swaps[: sum(end <= t for end in ends)], len(task.objects))


def positions_m(task: RecallTask, start_m: Positions, swaps: Swaps, t: int) -> Positions:
    """float64 [objects, 2] at control step `t`, for objects that stood at `start_m` [objects, 2] at first."""
    positions: Positions = start_m[list(places(task, swaps, t))]
    for i, (first, second) in enumerate(swaps):
        phase = (t - task.swap_start(i)) / task.swap_steps
        if 0.0 < phase < 1.0:
            path = _arcs(positions[first], positions[second], np.array([phase]))
            positions[[first, second]] = path[:, 0]
    return positions


def arcs_are_clear(start_m: Positions) -> bool:
    """Can any two of the objects at `start_m` [objects, 2] change places without coming near another one?"""
    for first, second in combinations(range(len(start_m)), 2):
        others = np.delete(start_m, [first, second], axis=0)
        path = _arcs(start_m[first], start_m[second], _CHECKED_PHASES)
        if (np.linalg.norm(path[:, :, None] - others, axis=-1) < SWAP_CLEARANCE_M).any():
            return False
    return True


def _places(swaps: Swaps, objects: int) -> tuple[int, ...]:
    where = list(range(objects))
    for first, second in swaps:
        where[first], where[second] = where[second], where[first]
    return tuple(where)


def _arcs(first: Positions, second: Positions, phase: npt.NDArray[np.float64]) -> Positions:
    """float64 [2, phases, 2]: half an ellipse each, on opposite sides, as wide as the passing distance."""
    half = (first - second) / 2
    side = np.array([-half[1], half[0]]) / np.linalg.norm(half) * SWAP_PASSING_M / 2
    angle = np.pi * phase[:, None]
    offset = np.cos(angle) * half + np.sin(angle) * side
    middle = (first + second) / 2
    return np.stack([middle + offset, middle - offset])
