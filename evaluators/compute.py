"""What a policy computes per control step, counted by torch's flop counter, two operations per multiplication."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ipvla.models.speeds import TwoSpeedsConfig
from ipvla.policy import Policy
from ipvla.types import Memory, Observation


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of matrix products, convolutions and attention.

    Attributes:
        thinking: of a call at which the slow part thinks; of any call, where there is one speed.
        acting: of a call at which it does not.
        calls: from one thought to the next.
        execute: control steps per call.
    """

    thinking: int
    acting: int
    calls: int
    execute: int

    @property
    def per_step(self) -> float:
        """Of a control step."""
        return (self.thinking + (self.calls - 1) * self.acting) / (self.calls * self.execute)

    def __str__(self) -> str:
        calls = f"; {self.thinking / 1e6:.2f} per thinking call, {self.acting / 1e6:.2f} per other"
        return f"{self.per_step / 1e6:.2f} MFLOP per control step{calls if self.calls > 1 else ''}"


def compute(policy: Policy, observation: Observation) -> Compute:
    """Counts two calls on this observation, with nothing remembered before the first."""
    speeds, execute = policy.config.speeds, policy.execute
    calls = -(-speeds.period // execute) if isinstance(speeds, TwoSpeedsConfig) else 1
    thinking, memory = _counted(policy, replace(observation, t=0), policy.initial_memory(1))
    acting = _counted(policy, replace(observation, t=execute), memory)[0] if calls > 1 else thinking
    return Compute(thinking, acting, calls, execute)


@torch.no_grad()
def _counted(policy: Policy, observation: Observation, memory: Memory) -> tuple[int, Memory]:
    with FlopCounterMode(display=False) as counter:
        _, memory = policy.act([observation], memory)
    return counter.get_total_flops(), memory
