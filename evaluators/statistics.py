"""Intervals and tests for counts of successes."""

from __future__ import annotations


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) in [0, 1] of a success probability, after k successes in n trials.

    Raises:
        ValueError: n < 1, k outside 0..n, or confidence outside (0, 1).
    """
    if n < 1:
        raise ValueError(f"an interval needs n >= 1 trials, got {n}; run some episodes first")
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes of {n} trials is impossible; k must lie in 0..n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not in (0, 1); use e.g. 0.95")
    from statsmodels.stats.proportion import proportion_confint  # takes a second

    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    return (float(low) if k > 0 else 0.0), (float(high) if k < n else 1.0)  # exact where rounding is not


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value in (0, 1]: do two policies differ on the same layouts?

    Args:
        only_first, only_second: layouts on which only that policy succeeded. The others say nothing.

    Raises:
        ValueError: a negative count.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts of discordant pairs are {only_first} and {only_second}; they cannot be negative")
    if only_first + only_second == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar

    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)
