"""The difference of two success rates on the same episodes, with its interval."""

from __future__ import annotations

import math

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
