"""New-task success against old-skill retention: whole trade-offs are compared, a single point proves nothing.

A method's points are its checkpoints and strengths, each (new-task success, retention), both better when larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluators.forgetting import Estimate, FloatArray, interval

#: Points [P, 2] -> a number, e.g. `partial(area, box=...)` or `partial(retention_at, new=0.7, otherwise=0.0)`.
Statistic = Callable[[FloatArray], float]


@dataclass(frozen=True)
class Box:
    """The reference box, the same for all methods compared: (low, high) of both axes."""

    new: tuple[float, float] = (0.0, 1.0)
    old: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("new", "old"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"box.{name} is ({low}, {high}); it must go from a lower to a higher value")


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


def area(points: FloatArray, box: Box) -> float:
    """The share of the box that points [P, 2] dominate, in [0, 1]: the hypervolume, without interpolation.

    Zitzler and Thiele, IEEE Transactions on Evolutionary Computation 3 (1999). What lies beyond the box counts as
    on its edge.
    """
    (x0, x1), (y0, y1) = box.new, box.old
    edge = front(np.clip(points, (x0, y0), (x1, y1)))
    widths = np.diff(edge[:, 0], prepend=x0)
    return float((widths * (edge[:, 1] - y0)).sum() / ((x1 - x0) * (y1 - y0)))


def retention_at(points: FloatArray, new: float, otherwise: float = np.nan) -> float:
    """Retention at new-task success `new`, along the straight lines between neighbours on the front.

    Below the front's first point that point's retention holds, since it succeeds more; beyond its last the method
    does not come, and the answer is `otherwise`.
    """
    edge = front(points)
    return float(np.interp(new, edge[:, 0], edge[:, 1])) if new <= edge[-1, 0] else otherwise


def estimate(
    statistic: Statistic, outcomes: Outcomes, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Estimate:
    """A statistic of one method's points, its interval from seeds and scenes drawn with replacement.

    Raises:
        ValueError: the statistic is NaN in a draw.
    """
    return _bootstrap(lambda points: statistic(points[0]), [outcomes], confidence, draws, seed)


def gap(
    statistic: Statistic,
    first: Outcomes,
    second: Outcomes,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """The first method's statistic minus the second's; every draw takes the same seeds and scenes from both.

    Raises:
        ValueError: the methods have different numbers of seeds or scenes, or the statistic is NaN in a draw.
    """
    sizes = [(len(o.new), o.new.shape[2], o.old.shape[2]) for o in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the methods have {sizes[0]} and {sizes[1]} seeds, new and old scenes; "
            "compare them on the same seeds and scenes"
        )

    def difference(points: list[FloatArray]) -> float:
        return statistic(points[0]) - statistic(points[1])

    return _bootstrap(difference, [first, second], confidence, draws, seed)


def _bootstrap(
    statistic: Callable[[list[FloatArray]], float],
    methods: list[Outcomes],
    confidence: float,
    draws: int,
    seed: int,
) -> Estimate:
    seeds, new, old = len(methods[0].new), methods[0].new.shape[2], methods[0].old.shape[2]
    rng = np.random.default_rng(seed)
    resampled = np.empty(draws)
    for draw in range(draws):
        s, n, m = (rng.multinomial(size, np.full(size, 1 / size)) / size for size in (seeds, new, old))
        resampled[draw] = statistic([_weighted(o, s, n, m) for o in methods])
    if undefined := int(np.isnan(resampled).sum()):
        raise ValueError(
            f"the statistic is undefined in {undefined} of {draws} draws; compare at a new-task success that the "
            "methods reach safely, or say what counts `otherwise`"
        )
    return interval(statistic([o.points for o in methods]), resampled, seeds, confidence)


def _weighted(outcomes: Outcomes, seeds: FloatArray, new: FloatArray, old: FloatArray) -> FloatArray:
    """The points under weights of seeds [S] and scenes [n], [m], each of sum 1."""
    return np.stack([seeds @ (outcomes.new @ new), seeds @ (outcomes.old @ old)], 1)
