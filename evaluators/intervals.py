"""Intervals and tests: success rates, differences of success rates on the same layouts, bootstraps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

#: Means that a confidence sequence looks at.
_GRID = 1001
#: Share of the capital that a bet may risk.
_MOST = 0.75


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


def newcombe_paired_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Newcombe's square-and-add interval (low, high) in [-1, 1] of the first rate minus the second.

    Method 10 of Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998): the distances from each rate to its Wilson limits, combined as
    standard errors of correlated estimates are, with the table's phi coefficient as the correlation.

    Args:
        both, only_first, only_second, neither: episodes on which both policies succeeded, only one, or none.

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


def resampled(values: npt.NDArray[Any], draws: int, seed: int) -> npt.NDArray[Any]:
    """Rows of values [N, ...], drawn with replacement: [draws, N, ...]."""
    rng = np.random.default_rng(seed)
    drawn: npt.NDArray[Any] = values[rng.integers(len(values), size=(draws, len(values)))]
    return drawn


def percentiles(statistics: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The 95 % percentile interval of resampled statistics [draws, ...]: float64 [2, ...], low and high."""
    tail = (1 - 0.95) / 2
    limits: npt.NDArray[np.float64] = np.quantile(statistics, [tail, 1 - tail], axis=0)
    return limits


def bootstrap_difference(
    strata: Sequence[tuple[int, int, int]], resamples: int = 10_000
) -> tuple[float, float] | None:
    """Percentile bootstrap 95 % interval (low, high) in [-1, 1] of the first success rate minus the second.

    None if no task has two layouts: every resample then equals the data, which says nothing about their spread.

    Layouts are resampled within each task: the interval is about these tasks, not about others like them.

    Args:
        strata: per task the layouts on which only the first succeeded, only the second, and either both or none.

    Raises:
        ValueError: no layout, or a negative count.
    """
    counts = np.array(strata, dtype=np.int64).reshape(-1, 3)
    if counts.min(initial=0) < 0 or counts.sum() == 0:
        raise ValueError(f"counts of pairs are {list(strata)}; they cannot be negative, nor all be 0")
    if counts.sum(axis=1).max() < 2:
        return None
    rng, difference = np.random.default_rng(0), np.zeros(resamples)
    for task in counts[counts.sum(axis=1) > 0]:
        drawn = rng.multinomial(task.sum(), task / task.sum(), size=resamples)
        difference += drawn[:, 0] - drawn[:, 1]
    low, high = percentiles(difference / counts.sum())
    return float(low), float(high)


def bootstrap_mean(
    strata: Sequence[Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (low, high) of the mean of values, one per layout.

    None if no task has two layouts. Layouts are resampled within each task, as by `bootstrap_difference`.

    Args:
        strata: per task the values of its layouts; what was measured several times on one layout is one value.
        seed: of the resampling; the same data give the same interval.

    Raises:
        ValueError: no value.
    """
    tasks = [np.array(values, dtype=np.float64) for values in strata if len(values)]
    if not tasks:
        raise ValueError("an interval needs at least one value; run some episodes first")
    if max(map(len, tasks)) < 2:
        return None
    sums = [resampled(values, resamples, seed + row).sum(axis=1) for row, values in enumerate(tasks)]
    low, high = percentiles(np.sum(sums, axis=0) / sum(map(len, tasks)))
    return float(low), float(high)


def minimum_detectable_difference(
    pairs: int, discordant: float, *, confidence: float = 0.95, power: float = 0.8
) -> float:
    """The smallest difference of two success rates that McNemar's test is likely to find on shared layouts.

    Solves n d^2 = (z_alpha sqrt(q) + z_power sqrt(q - d^2))^2 for d (Connor, "Sample size for testing differences
    in proportions for the paired-sample design", Biometrics 43, 1987), q being the share of discordant layouts.

    Args:
        pairs: layouts that both policies play.
        discordant: share of them, in (0, 1], on which only one of the two succeeds. 2 p (1 - p) for two policies
            of success p that have nothing in common; less for similar ones.
        power: probability of finding it.

    Returns:
        In (0, discordant]; `discordant` itself where even a difference as large as that could be missed.

    Raises:
        ValueError: an argument is out of its range.
    """
    if pairs < 1:
        raise ValueError(f"{pairs} pairs show nothing; play at least 1")
    if not 0 < discordant <= 1:
        raise ValueError(f"discordant is {discordant}; it must lie in (0, 1]")
    if not (0 < confidence < 1 and 0 < power < 1):
        raise ValueError(f"confidence {confidence} and power {power} must lie in (0, 1)")
    z_alpha, z_power = (NormalDist().inv_cdf(p) for p in ((1 + confidence) / 2, power))
    under_root = pairs + z_power**2 - z_alpha**2
    if under_root < 0:
        return discordant
    d = math.sqrt(discordant) * (z_alpha * math.sqrt(pairs) + z_power * math.sqrt(under_root))
    return min(d / (pairs + z_power**2), discordant)


def confidence_sequence(values: Sequence[float], confidence: float = 0.95) -> list[tuple[float, float]]:
    """After each value, an interval (low, high) of the mean; all of them hold at once with this confidence.

    So an evaluation may look after every value and stop as soon as it knows enough. This is the hedged betting
    confidence sequence of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting"
    (JRSS B 86, 2024; arXiv 2010.09686, theorem 3 with the plug-in bets of equation 26): for every mean m a gambler
    bets against it; a mean that would have made the gambler 1 / alpha times as rich is excluded, for good.

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
    up, down = np.zeros(_GRID), np.zeros(_GRID)  # log capital of the bets on a larger and on a smaller mean
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
    remaining, step = means[left], 1 / (_GRID - 1)
    if not len(remaining):
        return centre, centre
    return max(float(remaining[0]) - step, 0.0), min(float(remaining[-1]) + step, 1.0)


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
