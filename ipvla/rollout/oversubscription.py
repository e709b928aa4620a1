"""How many simulators keep the cores busy: more than there are cores, as long as each waits for the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ipvla.types import EpisodeResult

#: Simulators per core, at most: each takes some hundred MB.
MOST_PER_CORE = 2
#: A policy that works for more of the time is what everybody waits for; more simulators would only queue.
_SATURATED = 0.9


def simulators_for(cores: int, results: Sequence[EpisodeResult], policy_busy: float) -> int:
    """From episodes that were played by one simulator per core.

    A simulator needs a core while it does not wait for the policy; n of them keep the cores busy once
    n (1 - waiting) = cores.

    Args:
        cores: that simulators may use.
        results: of at least one episode.
        policy_busy: share of the time in which the policy works, in [0, 1].

    Returns:
        In cores .. MOST_PER_CORE * cores.
    """
    if policy_busy > _SATURATED:
        return cores
    waiting = sum(result.policy_s for result in results) / sum(result.wall_s for result in results)
    wanted = math.ceil(cores / max(1 - waiting, 1 / MOST_PER_CORE) - 1e-9)
    return min(max(wanted, cores), MOST_PER_CORE * cores)
