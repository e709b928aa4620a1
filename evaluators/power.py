"""What an evaluation can show, told before it is run."""

from __future__ import annotations

import math
from statistics import NormalDist


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
        power: with which it is found.

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
