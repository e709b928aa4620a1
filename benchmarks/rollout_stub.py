"""Simulators and a policy that only wait, as long as they are told: how the service scales beyond this machine.

A waiting process takes no core, so hundreds of simulators run beside each other here, and what is left to measure
is the service: its queue, its batches, and the way of an observation to the policy and of a chunk back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ipvla.sim.simulator import StepOutcome, Task
from ipvla.types import Memory, Observation

if TYPE_CHECKING:  # a simulator's process has no use for it
    from ipvla.rollout.policy_server import BatchPolicy

#: Control steps that a chunk is played for.
EXECUTE: Final = 8
_SIDE, _ACTIONS = 224, 7
#: A chunk's time in the simulator lies within this share of its mean: simulators that all took exactly as long
#: would ask all at once for ever.
JITTER = 0.3


@dataclass(frozen=True)
class ForwardTime:
    """What a forward pass takes: `fixed_s + per_row_s * batch`."""

    fixed_s: float
    per_row_s: float

    def __call__(self, batch: int) -> float:
        """Seconds."""
        return self.fixed_s + self.per_row_s * batch


@dataclass(frozen=True)
class WaitingSimulators:
    """Makes simulators that take so many seconds per chunk; an episode is so many chunks long."""

    chunk_s: float
    chunks: int

    def __call__(self, suite: str, task: str) -> _WaitingSimulator:
        return _WaitingSimulator(self.chunk_s, Task(task, task, ("go",), self.chunks * EXECUTE, chance=0.0))


class _WaitingSimulator:
    def __init__(self, chunk_s: float, task: Task) -> None:
        self.task, self._chunk_s = task, chunk_s
        self.reset(0)

    def reset(self, seed: int) -> None:
        self._random, self._t = np.random.default_rng(seed), 0

    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome:
        self._t += 1
        if self._t % EXECUTE == 0:  # at once: eight short waits would wake the process eight times
            time.sleep(self._chunk_s * self._random.uniform(1 - JITTER, 1 + JITTER))
        return StepOutcome(success=False, failure=False)

    def observe(self, geometry: bool = False) -> Observation:
        picture = np.zeros((_SIDE, _SIDE, 3), np.uint8)
        return Observation({"agentview": picture}, np.zeros(8, np.float32), "put the bowl on the plate", self._t)

    @property
    def t(self) -> int:
        return self._t

    def joints(self) -> npt.NDArray[np.float32]:
        return np.zeros(7, np.float32)

    def frame(self, size: int = 256) -> npt.NDArray[np.uint8]:
        return np.zeros((size, size, 3), np.uint8)

    def state(self) -> dict[str, npt.NDArray[np.float64]]:
        return {}

    def restore(self, state: object) -> None: ...

    def details(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


@dataclass(frozen=True)
class WaitingPolicies:
    """Loads, from any directory, a policy whose forward pass takes so long, with a memory of `width` floats."""

    forward: ForwardTime
    width: int = 256
    execute: int = EXECUTE

    def __call__(self, _directory: Path) -> BatchPolicy:
        return self

    def initial_memory(self, batch: int) -> Memory:
        import torch

        return {"hidden": torch.zeros(batch, self.width)}

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        if wait_s := self.forward(len(observations)):
            time.sleep(wait_s)
        actions = np.zeros((len(observations), self.execute, _ACTIONS), np.float32)
        return actions, {name: tensor + 1 for name, tensor in memory.items()}


NO_TIME: Final = WaitingPolicies(ForwardTime(0.0, 0.0))
