"""The difference of two success rates on the same episodes, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evaluators.statistics import wilson_interval


def newcombe_paired_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Newcombe's square-and-add interval (low, high) in [-1, 1] of the first rate minus the second.

    Method 10 of Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998): the distances from each rate to its Wilson limits, combined as
    standard errors of correlated estimates are, with the table's phi coefficient as the correlation.

    Args:
        both, only_first, only_second, neither: episodes by who succeeded.

    Raises:
        ValueError: a negative count, no episode at all, or confidence outside (0, 1).
    """
    counts = (both, only_first, only_second, neither)
    if min(counts) < 0:
        raise ValueError(f"counts of pairs are {counts}; they cannot be negative")
    n = sum(counts)
    first, second = both + only_first, both + only_second
    low1, high1 = wilson_interval(first, n, confidence)
    low2, high2 = wilson_interval(second, n, confidence)
    p1, p2 = first / n, second / n
    phi = _phi(both, only_first, only_second, neither)
    below = _combine(p1 - low1, high2 - p2, phi)
    above = _combine(high1 - p1, p2 - low2, phi)
    return max(p1 - p2 - below, -1.0), min(p1 - p2 + above, 1.0)


def bootstrap_difference(
    strata: Sequence[tuple[int, int, int]], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) in [-1, 1] of the first success rate minus the second.

    Layouts are resampled within each task: the interval is about these tasks, not about others like them.

    Args:
        strata: per task the layouts on which only the first succeeded, only the second, and either both or none.
        seed: of the resampling; the same data give the same interval.

    Raises:
        ValueError: no layout, or a negative count.
    """
    counts = np.array(strata, dtype=np.int64).reshape(-1, 3)
    if counts.min(initial=0) < 0 or counts.sum() == 0:
        raise ValueError(f"counts of pairs are {list(strata)}; they cannot be negative, nor all be 0")
    rng, difference = np.random.default_rng(seed), np.zeros(resamples)
    for task in counts[counts.sum(axis=1) > 0]:
        drawn = rng.multinomial(task.sum(), task / task.sum(), size=resamples)
        difference += drawn[:, 0] - drawn[:, 1]
    tail = (1 - confidence) / 2
    low, high = np.quantile(difference / counts.sum(), [tail, 1 - tail])
    return float(low), float(high)


def _phi(a: int, b: int, c: int, d: int) -> float:
    """The fourfold table's correlation, with Newcombe's continuity correction where it is positive."""
    product = (a + b) * (c + d) * (a + c) * (b + d)
    if product == 0:
        return 0.0
    excess = a * d - b * c
    corrected = max(excess - (a + b + c + d) / 2, 0.0) if excess > 0 else excess
    return corrected / math.sqrt(product)


def _combine(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))
