"""How many simulators keep the cores busy: more than there are cores, as long as each waits for the policy."""

from __future__ import annotations

import math

#: Simulators per core, at most: each takes some hundred MB.
MOST_PER_CORE = 2
#: Of memory, for a simulator with as many worlds open as it keeps (0.5 GB of the embedded suite's).
SIMULATOR_BYTES = 2**30
#: A policy that works for more of the time is what everybody waits for; more simulators would only queue.
_SATURATED = 0.9


def simulators_for(cores: int, waiting: float, policy_busy: float, room: int) -> int:
    """From what was measured with one simulator per core.

    A simulator needs a core while it does not wait for the policy; n of them keep the cores busy once
    n (1 - waiting) = cores.

    Args:
        cores: that simulators may use.
        waiting: share of the simulators' time in which they wait for the policy, in [0, 1].
        policy_busy: share of the time in which the policy works, in [0, 1].
        room: simulators that there is memory for, at least 1.

    Returns:
        In cores .. MOST_PER_CORE * cores, or `room` if that is less.
    """
    if policy_busy > _SATURATED:
        return min(cores, room)
    wanted = math.ceil(cores / max(1 - waiting, 1 / MOST_PER_CORE) - 1e-9)
    return min(max(wanted, cores), MOST_PER_CORE * cores, room)
