"""New-task success against old-skill retention: whole trade-offs are compared, a single point proves nothing.

A method's points are its checkpoints and strengths, each (new-task success, retention), both better when larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluators.forgetting import Estimate, FloatArray, interval

#: Points [P, 2] -> a number, e.g. `area` or `partial(retention_at, new=0.7)`.
Statistic = Callable[[FloatArray], float]


@dataclass(frozen=True)
class Outcomes:
    """What one method did.

    Attributes:
        new: [S, P, n], seeds, points, scenes: success on the new task, or scores.
        old: [S, P, m], of old skills. All methods compared played the same scenes in the same order.
    """

    new: FloatArray
    old: FloatArray

    def __post_init__(self) -> None:
        new, old = self.new, self.old
        if new.ndim != 3 or old.ndim != 3 or new.shape[:2] != old.shape[:2] or not new.size or not old.size:
            raise ValueError(
                f"outcomes have shapes {new.shape} and {old.shape}; give [seeds, points, scenes], none of them 0, "
                "with the same seeds and points"
            )
        if not (np.isfinite(new).all() and np.isfinite(old).all()):
            raise ValueError(
                "outcomes hold NaN or infinity; leave out points that were not measured in every seed"
            )

    @property
    def points(self) -> FloatArray:
        """Means over seeds and scenes: float64 [P, 2]."""
        return np.stack([self.new.mean((0, 2)), self.old.mean((0, 2))], 1)


def front(points: FloatArray) -> FloatArray:
    """Those of points [P, 2] that no other matches or beats on both axes: [F, 2], ascending in new-task success.

    Retention falls strictly along it; of equal points one is kept.
    """
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points have shape {points.shape}; give [P, 2] with P >= 1")
    ordered = points[np.lexsort((-points[:, 1], -points[:, 0]))]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], ordered[:-1, 1]]))
    return ordered[ordered[:, 1] > before][::-1]


def area(points: FloatArray) -> float:
    """The share of the unit square that points [P, 2] dominate, in [0, 1]: the hypervolume, without interpolation.

    Zitzler and Thiele, IEEE Transactions on Evolutionary Computation 3 (1999). What lies beyond the square counts
    as on its edge.
    """
    edge = front(np.clip(points, 0.0, 1.0))
    widths = np.diff(edge[:, 0], prepend=0.0)
    return float((widths * edge[:, 1]).sum())


def retention_at(points: FloatArray, new: float) -> float:
    """Retention at new-task success `new`, along the straight lines between neighbours on the front.

    Below the front's first point that point's retention holds, since it succeeds more; beyond its last the method
    does not come, and the answer is NaN.
    """
    edge = front(points)
    return float(np.interp(new, edge[:, 0], edge[:, 1])) if new <= edge[-1, 0] else np.nan


def gap(statistic: Statistic, first: Outcomes, second: Outcomes, draws: int = 2000) -> Estimate:
    """The first method's statistic minus the second's, its interval from seeds and scenes drawn with replacement.

    Every draw takes the same seeds and scenes from both.

    Raises:
        ValueError: the methods have different numbers of seeds or scenes, or the statistic is NaN in a draw.
    """
    sizes, others = ((len(o.new), o.new.shape[2], o.old.shape[2]) for o in (first, second))
    if sizes != others:
        raise ValueError(
            f"the methods have {sizes} and {others} seeds, new and old scenes; "
            "compare them on the same seeds and scenes"
        )
    rng = np.random.default_rng(0)
    drawn = np.empty(draws)
    for draw in range(draws):
        weights = [rng.multinomial(size, np.full(size, 1 / size)) / size for size in sizes]
        drawn[draw] = statistic(_weighted(first, *weights)) - statistic(_weighted(second, *weights))
    if undefined := int(np.isnan(drawn).sum()):
        raise ValueError(
            f"the statistic is undefined in {undefined} of {draws} draws; compare at a new-task success that the "
            "methods reach safely"
        )
    return interval(statistic(first.points) - statistic(second.points), drawn, sizes[0])


def _weighted(outcomes: Outcomes, seeds: FloatArray, new: FloatArray, old: FloatArray) -> FloatArray:
    """The points under weights of seeds [S] and scenes [n], [m], each of sum 1."""
    return np.stack([seeds @ (outcomes.new @ new), seeds @ (outcomes.old @ old)], 1)
