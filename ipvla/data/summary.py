"""Summaries of a vector feature over some episodes: they merge into what all episodes together have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ipvla.data.normalisation import FeatureStatistics

#: The quantiles that statistics have; their tails are stored exactly.
_Q01, _Q99 = 0.01, 0.99


def tail_size(steps: int) -> int:
    """How many smallest and how many largest values decide both quantiles of at most so many control steps."""
    return int(_Q01 * steps) + 3


@dataclass(frozen=True)
class FeatureSummary:
    """One feature of n episodes, each in a row of its own, and the tails of all their values.

    Moments stay apart until the end, so that the result does not depend on how episodes were grouped.

    Attributes:
        mean, squares: float64 [n, D], the mean and the sum of squared distances from it, of each episode.
        low, high: float32 [min(N, tail), D], the smallest and the largest values of each dimension, in any order.
    """

    mean: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]

    @classmethod
    def of(cls, episodes: Sequence[npt.NDArray[np.float32]], tail: int) -> Self:
        """Of one [T, D] array per episode, at least one step in all; an episode of no steps counts as 0."""
        rows = [np.asarray(episode, np.float64) for episode in episodes]
        mean = np.stack([row.mean(0) if len(row) else np.zeros(row.shape[1]) for row in rows])
        squares = np.stack([((row - m) ** 2).sum(0) for row, m in zip(rows, mean, strict=True)])
        values = np.concatenate(episodes)
        return cls(mean, squares, _smallest(values, tail), -_smallest(-values, tail))

    @classmethod
    def merged(cls, parts: Sequence[Self], tail: int) -> Self:
        """Of the episodes of all parts, one after another."""
        return cls(
            np.concatenate([part.mean for part in parts]),
            np.concatenate([part.squares for part in parts]),
            _smallest(np.concatenate([part.low for part in parts]), tail),
            -_smallest(-np.concatenate([part.high for part in parts]), tail),
        )

    def ordered(self, order: npt.NDArray[np.int64]) -> FeatureSummary:
        """With its episodes in another order."""
        return FeatureSummary(self.mean[order], self.squares[order], self.low, self.high)

    def statistics(self, lengths: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> FeatureStatistics:
        """What `FeatureStatistics.compute` makes of all values; moments to the last bit or two.

        Args:
            lengths: int64 [n], control steps per episode, 0 for one that counts nothing; N >= 1 in all.
            mask: bool [D], dimensions that are normalised.
        """
        steps, weight = int(lengths.sum()), lengths[:, None]
        mean = (weight * self.mean).sum(0) / steps
        variance = (self.squares.sum(0) + (weight * (self.mean - mean) ** 2).sum(0)) / steps
        low, high = np.sort(self.low, axis=0), np.sort(self.high, axis=0)
        rows = {
            "mean": mean,
            "std": np.sqrt(variance),
            "min": low[0],
            "max": high[-1],
            "q01": _quantile(low, _Q01, steps, first=0),
            "q99": _quantile(high, _Q99, steps, first=steps - len(high)),
        }
        return FeatureStatistics(**{name: row.astype(np.float32) for name, row in rows.items()}, mask=mask)


def _smallest(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    return np.partition(values, count - 1, axis=0)[:count] if len(values) > count else values


def _quantile(sorted_values: npt.NDArray[np.float32], q: float, steps: int, first: int) -> npt.NDArray[np.float64]:
    """As `np.quantile` of all values, of which `sorted_values` are those of rank `first` and more."""
    place = q * (steps - 1)
    below = int(place)
    pair = [below - first, min(below + 1, steps - 1) - first]
    return np.asarray(np.quantile(sorted_values[pair].astype(np.float64), place - below, axis=0))
