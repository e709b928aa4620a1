"""What is random in an episode, drawn from its seed alone: layout, cues, swaps and phrasing.

Also where each object is while some change places: plain geometry, no physics.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from ipvla.sim.recall.scene import MIN_DISTANCE_M, SWAP_CLEARANCE_M, SWAP_PASSING_M, WORKSPACE_X_M, WORKSPACE_Y_M
from ipvla.sim.recall.tasks import RecallTask

Positions = npt.NDArray[np.float64]
Swaps = Sequence[tuple[int, int]]

_SEEDS = 2**32
_CHECKED_PHASES = np.linspace(0.0, 1.0, 33)


@dataclass(frozen=True)
class Episode:
    """One draw.

    Attributes:
        seed: in [0, 2^32).
        instruction: one of the task's phrasings.
        cues: indices of the objects that are shown at the start, all different; empty for tasks without a cue.
            In the order of their lighting up where that counts, else from left to right in the picture.
        positions_m: float64 [objects, 2], x and y relative to the table's centre, before any swap.
        swaps: pairs of indices of the objects that change places, one pair after another.
        cue_at: the control step at which the cue begins.
        roamed_m: float64 [horizon + 1, roaming objects, 2], how far those have gone from where they stood, by the
            control step; None where none roams.
    """

    seed: int
    instruction: str
    cues: tuple[int, ...]
    positions_m: Positions
    swaps: tuple[tuple[int, int], ...] = ()
    cue_at: int = 0
    roamed_m: Positions | None = None


def episode_rng(task: RecallTask, seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, so that drawing more of one thing never changes another.

    The scene's name takes part: tasks that are collected with the same seeds still see different layouts.
    """
    return np.random.default_rng([seed, zlib.crc32(f"{task.scene or task.name}/{purpose}".encode())])


def draw_episode(task: RecallTask, seed: int) -> Episode:
    """The task's episode with this seed.

    Raises:
        ValueError: the seed is outside [0, 2^32).
    """
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed {seed} is outside [0, 2^32); take it from Split.TRAIN.seed or Split.HELD_OUT.seed")
    phrasing = int(episode_rng(task, seed, "phrasing").integers(len(task.phrasings)))
    positions = _layout(task, seed)
    first, last = task.cue_from
    cue_at = first if first == last else int(episode_rng(task, seed, "cue_at").integers(first, last + 1))
    return Episode(
        seed,
        task.phrasings[phrasing],
        _cues(task, seed, positions),
        positions,
        _swaps(task, seed),
        cue_at,
        _roamed(task, seed, positions) if task.roaming else None,
    )


def _cues(task: RecallTask, seed: int, positions_m: Positions) -> tuple[int, ...]:
    rng = episode_rng(task, seed, "cue")
    if task.items == 1:
        return (int(rng.integers(len(task.objects))),)
    cues = rng.permutation(len(task.objects))[: task.items].tolist()
    return tuple(cues if task.ordered else sorted(cues, key=lambda i: positions_m[i, 1]))


def _swaps(task: RecallTask, seed: int) -> tuple[tuple[int, int], ...]:
    """Pairs drawn with replacement: after two swaps of three objects each is in each place equally often."""
    rng = episode_rng(task, seed, "swaps")
    pairs = (rng.permutation(len(task.objects))[:2].tolist() for _ in range(task.swaps))
    return tuple((first, second) for first, second in pairs)


def _roamed(task: RecallTask, seed: int, start_m: Positions) -> Positions:
    """Straight ways of half a second to a second, one after another, in the workspace and clear of the others."""
    rng = episode_rng(task, seed, "roaming")
    low, high = np.transpose([WORKSPACE_X_M, WORKSPACE_Y_M])
    where = start_m.copy()
    path = np.zeros((task.horizon + 1, len(task.roaming), 2))
    ends = np.zeros(len(task.roaming), dtype=np.int64)
    ways = np.zeros((len(task.roaming), 2))
    for t in range(1, task.horizon + 1):
        for number, index in enumerate(task.roaming):
            others = np.delete(where, index, axis=0)
            while t > ends[number]:
                angle, steps = rng.uniform(0, 2 * np.pi), int(rng.integers(10, 21))
                way = task.roaming_step_m * np.array([np.cos(angle), np.sin(angle)])
                points = where[index] + way * np.arange(1, steps + 1)[:, None]
                inside = ((points >= low) & (points <= high)).all()
                if inside and np.linalg.norm(points[:, None] - others, axis=-1).min() >= MIN_DISTANCE_M:
                    ends[number], ways[number] = t + steps - 1, way
            where[index] = where[index] + ways[number]
            path[t, number] = where[index] - start_m[index]
    return path


def _layout(task: RecallTask, seed: int) -> Positions:
    """Uniform over the layouts in which no two objects are closer than `MIN_DISTANCE_M`.

    Where objects will be swapped, any two must be able to: so the layout tells nothing about the swaps.
    """
    rng = episode_rng(task, seed, "layout")
    low, high = np.transpose([WORKSPACE_X_M, WORKSPACE_Y_M])
    while True:
        positions = rng.uniform(low, high, size=(len(task.objects), 2))
        distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
        apart = (distances[np.triu_indices(len(positions), k=1)] >= MIN_DISTANCE_M).all()
        if apart and (not task.swaps or arcs_are_clear(positions)):
            return positions


def places(task: RecallTask, swaps: Swaps, t: int) -> tuple[int, ...]:
    """For each object, whose first place it is in after the swaps that have ended by control step `t`."""
    ends = (task.swap_start(i) + task.swap_steps for i in range(len(swaps)))
    return _places(swaps[: sum(end <= t for end in ends)], len(task.objects))


def planned_m(task: RecallTask, episode: Episode, t: int) -> Positions:
    """float64 [objects, 2], x and y of where the episode has the objects at control step `t`."""
    positions = positions_m(task, episode.positions_m, episode.swaps, t)
    if episode.roamed_m is not None:
        positions[list(task.roaming)] += episode.roamed_m[min(t, task.horizon)]
    return positions


def positions_m(task: RecallTask, start_m: Positions, swaps: Swaps, t: int) -> Positions:
    """The same of objects that stood at `start_m` [objects, 2] at first and do nothing but change places."""
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


def _arcs(first: Positions, second: Positions, phase: Positions) -> Positions:
    """float64 [2, phases, 2]: half an ellipse each, on opposite sides, as wide as the passing distance."""
    half = (first - second) / 2
    side = np.array([-half[1], half[0]]) / np.linalg.norm(half) * SWAP_PASSING_M / 2
    angle = np.pi * phase[:, None]
    offset = np.cos(angle) * half + np.sin(angle) * side
    middle = (first + second) / 2
    return np.stack([middle + offset, middle - offset])
