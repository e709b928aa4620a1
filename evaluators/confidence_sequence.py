"""Intervals that hold however often one looks, so that an evaluation may stop as soon as it knows enough.

The hedged betting confidence sequence of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting" (JRSS B 86, 2024; arXiv 2010.09686, theorem 3 with the plug-in bets of equation 26): for every mean m one
gambles against it; a mean that would have made the gambler 1 / alpha times as rich is excluded, for good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_GRID = 1001
#: Share of the capital that a bet may risk.
_MOST = 0.75


def confidence_sequence(values: Sequence[float], confidence: float = 0.95) -> list[tuple[float, float]]:
    """After each value, an interval (low, high) of the mean; all of them hold at once with this confidence.

    Args:
        values: in [0, 1], in the order in which they were drawn: independent, or each with the same mean whatever
            came before it. Values must not be left out by how they turned out (an episode that is still running).

    Returns:
        As many intervals, each within the one before it, to 0.001.

    Raises:
        ValueError: a value outside [0, 1], or confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not in (0, 1); use e.g. 0.95")
    alpha = 1 - confidence
    means = np.linspace(0, 1, _GRID)
    up, down = np.zeros(_GRID), np.zeros(_GRID)  # log capital of who bets on more, on less
    with np.errstate(divide="ignore"):
        largest_up, largest_down = _MOST / means, _MOST / (1 - means)
    left = np.ones(_GRID, np.bool_)
    total, spread, intervals = 0.5, 0.25, []
    for n, value in enumerate(values, 1):
        if not 0 <= value <= 1:
            raise ValueError(f"value {n - 1} is {value}; means of values outside [0, 1] have no such interval")
        variance = spread / n
        bet = math.sqrt(2 * math.log(2 / alpha) / (variance * n * math.log(1 + n)))
        up += np.log1p(np.minimum(bet, largest_up) * (value - means))
        down += np.log1p(-np.minimum(bet, largest_down) * (value - means))
        left &= np.maximum(up, down) + math.log(0.5) < -math.log(alpha)
        total += value
        spread += (value - total / (n + 1)) ** 2
        intervals.append(_hull(means, left, total / (n + 1)))
    return intervals


def _hull(means: np.ndarray, left: np.ndarray, centre: float) -> tuple[float, float]:
    """The interval around all means that are left, widened by the grid's step: the truth may lie between two."""
    kept, step = means[left], 1 / (_GRID - 1)
    if not len(kept):
        return centre, centre
    return max(float(kept[0]) - step, 0.0), min(float(kept[-1]) + step, 1.0)
