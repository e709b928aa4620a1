"""Statistics of one vector feature, from all values or from mergeable summaries, and what they normalise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

#: OpenVLA's three (prismatic/vla/datasets/rlds/utils/data_utils.py): the 1 % and 99 % quantiles onto [-1, 1] and
#: clipped; the minimum and maximum onto [-1, 1]; mean 0 and standard deviation 1, not clipped. And two of LeRobot
#: and openpi: the same quantiles, or minimum and maximum, not clipped.
Normalisation: TypeAlias = Literal["bounds_q99", "bounds", "normal", "quantiles", "min_max"]
NORMALISATIONS: Final[tuple[str, ...]] = get_args(Normalisation)

#: Keeps a division by a span of 0 finite.
_EPSILON = 1e-8
#: The rows that a normalisation needs.
_ROWS: Final = {
    "bounds_q99": ("q01", "q99"),
    "bounds": ("min", "max"),
    "normal": ("mean", "std"),
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
}
#: They neither clip nor have dimensions that become 0.
_UNCLIPPED: Final = ("quantiles", "min_max")


@dataclass(frozen=True)
class FeatureStatistics:
    """Per-dimension statistics of one vector feature, each float32 [D].

    Attributes:
        mean, std, min, max, q01, q99: over all control steps, in the feature's units; NaN where a file had none.
        mask: bool [D], True where the feature is normalised; False passes it through (the gripper).
    """

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    min: npt.NDArray[np.float32]
    max: npt.NDArray[np.float32]
    q01: npt.NDArray[np.float32]
    q99: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]

    @classmethod
    def compute(cls, values: npt.NDArray[np.floating[Any]], mask: npt.NDArray[np.bool_]) -> Self:
        """From [N, D] values, one row per control step, N >= 1."""
        x = np.asarray(values, np.float64)
        rows = {
            "mean": x.mean(0),
            "std": x.std(0),
            "min": x.min(0),
            "max": x.max(0),
            "q01": np.quantile(x, 0.01, axis=0),
            "q99": np.quantile(x, 0.99, axis=0),
        }
        return cls(**{name: row.astype(np.float32) for name, row in rows.items()}, mask=mask)

    @property
    def dim(self) -> int:
        return len(self.mask)

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """bool [D], True where the feature never changed: there is nothing to predict."""
        return np.asarray(self.min == self.max)

    def require(self, kind: Normalisation) -> None:
        """ValueError if these statistics lack what a normalisation needs."""
        missing = [row for row in _ROWS[kind] if np.isnan(getattr(self, row)).any()]
        if missing:
            known = [k for k, rows in _ROWS.items() if not any(np.isnan(getattr(self, r)).any() for r in rows)]
            raise ValueError(
                f"normalisation is {kind!r}, and the statistics have no {' and '.join(missing)}; "
                f"choose {' or '.join(known)}, or compute the statistics from the dataset"
            )

    def normalise(self, x: npt.NDArray[Any], kind: Normalisation = "bounds_q99") -> npt.NDArray[Any]:
        """[..., D] in units -> [..., D] as `kind` says; constant dimensions become 0, unless it is unclipped."""
        a, b = self._rows(kind)
        if kind in _UNCLIPPED:
            return np.where(self.mask, 2 * (x - a) / np.where(a == b, _EPSILON, b - a) - 1, x)
        y = (x - a) / (b + _EPSILON) if kind == "normal" else (2 * (x - a) / (b - a + _EPSILON) - 1).clip(-1, 1)
        return np.where(self._fixed(kind), 0.0, np.where(self.mask, y, x))

    def denormalise(self, y: npt.NDArray[Any], kind: Normalisation = "bounds_q99") -> npt.NDArray[Any]:
        """The inverse where nothing was clipped; constant dimensions get their exact constant, whatever `y` is."""
        a, b = self._rows(kind)
        x = y * (b + _EPSILON) + a if kind == "normal" else 0.5 * (y + 1) * (b - a) + a
        return np.where(self.constant, self.min, np.where(self.mask, x, y))

    def _rows(self, kind: Normalisation) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        first, second = _ROWS[kind]
        return getattr(self, first), getattr(self, second)

    def _fixed(self, kind: Normalisation) -> npt.NDArray[np.bool_]:
        if kind != "bounds_q99":
            return self.constant
        # Equal quantiles with rare outliers carry no scale: the formula would send the usual value to -1.
        return np.asarray(self.constant | (self.mask & (self.q01 == self.q99)))


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
