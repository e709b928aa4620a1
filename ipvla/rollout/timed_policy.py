"""A policy that keeps the time of its answers: what of a service's time is the model's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ipvla.types import Memory, Observation

if TYPE_CHECKING:
    from ipvla.rollout.policy_server import Policy


@dataclass
class ActTime:
    """In all `act`s so far: wall time, and CPU time of the thread that called."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


class TimedPolicy:
    """Adds what `policy.act` takes to `spent`, also where it raises."""

    def __init__(self, policy: Policy, spent: ActTime) -> None:
        self._policy, self._spent = policy, spent

    @property
    def execute(self) -> int:
        """The policy's."""
        return self._policy.execute

    def initial_memory(self, batch: int) -> Memory:
        return self._policy.initial_memory(batch)

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        """The policy's."""
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        try:
            return self._policy.act(observations, memory)
        finally:
            self._spent.wall_s += time.perf_counter() - began_s
            self._spent.cpu_s += time.thread_time() - cpu_began_s
