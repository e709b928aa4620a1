"""In which order an epoch's frames come: numbers alone, so that a place is found without reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]

#: Random numbers are drawn in blocks of this size.
_BLOCK = 4096


@dataclass(frozen=True)
class Visit:
    """One episode's turn in an epoch; `copy` tells apart several turns of an episode with a weight above 1."""

    dataset: int
    episode: int
    copy: int = 0


def epoch_visits(repeats: Iterable[IntArray], seed: int, epoch: int, shuffle: bool) -> list[Visit]:
    """All turns of one epoch, in order.

    Args:
        repeats: per dataset int64 [E], how often each episode comes (`Mixture.repeats`).
        seed, epoch: non-negative, of the order.
        shuffle: False keeps the datasets' own.
    """
    visits = [
        Visit(dataset, episode, copy)
        for dataset, times in enumerate(repeats)
        for episode, often in enumerate(times.tolist())
        for copy in range(often)
    ]
    rng = np.random.default_rng((seed, epoch, 0))
    return [visits[i] for i in rng.permutation(len(visits))] if shuffle else visits


def frame_order(lengths: Sequence[int], buffer: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(turn, step) of every frame of turns with these lengths, each exactly once.

    Frames enter a buffer in order, and the next one out is drawn from it once it holds more than `buffer`; 0 keeps
    their order.
    """
    luck = _uniform(rng)
    held: list[tuple[int, int]] = []
    for turn, length in enumerate(lengths):
        for step in range(length):
            held.append((turn, step))
            if len(held) > buffer:
                yield _take(held, next(luck))
    while held:
        yield _take(held, next(luck))


def _take(held: list[tuple[int, int]], place: float) -> tuple[int, int]:
    i = int(place * len(held))
    held[i], held[-1] = held[-1], held[i]
    return held.pop()


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(_BLOCK).tolist()
