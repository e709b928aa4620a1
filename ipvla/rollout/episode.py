"""One episode, closed loop: observe, ask the policy for a chunk, play it, until the task is decided."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import EpisodeResult, EpisodeSpec, Observation

#: Float [E, A], E >= 1: the actions to play before the policy is asked again.
Chunk = npt.NDArray[np.float32]
#: (observation, policy step counted from 0) -> Chunk.
Act = Callable[[Observation, int], Chunk]


class EpisodeObserver(Protocol):
    """Watches an episode (video, traces) without a part in it."""

    def on_reset(self, simulator: Simulator) -> None: ...
    def on_step(self, simulator: Simulator, action: npt.NDArray[np.float32], outcome: StepOutcome) -> None: ...


class InvalidActionError(ValueError):
    """The policy's chunk cannot be played."""


def run_episode(
    simulator: Simulator, spec: EpisodeSpec, act: Act, observers: Sequence[EpisodeObserver] = ()
) -> EpisodeResult:
    """Plays `spec` from its seed to its end; at most `simulator.task.horizon` control steps.

    Raises:
        InvalidActionError: a chunk is empty, has no action axis, or is not finite.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    policy_s = asking_cpu_s = 0.0
    steps, policy_steps, outcome = 0, 0, StepOutcome(success=False, failure=False)
    simulator.reset(spec.seed)
    for observer in observers:
        observer.on_reset(simulator)
    while not outcome.done and steps < simulator.task.horizon:
        observation = simulator.observe()
        asked, cpu_asked = time.perf_counter(), time.process_time()
        chunk = _checked(act(observation, policy_steps), spec)
        policy_s += time.perf_counter() - asked
        asking_cpu_s += time.process_time() - cpu_asked
        policy_steps += 1
        for action in chunk[: simulator.task.horizon - steps]:
            outcome = simulator.step(action)
            steps += 1
            for observer in observers:
                observer.on_step(simulator, action, outcome)
            if outcome.done:
                break
    return EpisodeResult(
        spec=spec,
        outcome="success" if outcome.success else "failure" if outcome.failure else "timeout",
        steps=steps,
        policy_steps=policy_steps,
        wall_s=time.perf_counter() - started,
        policy_s=policy_s,
        sim_cpu_s=time.process_time() - cpu_started - asking_cpu_s,
        details=dict(simulator.details()),
    )


def _checked(chunk: Chunk, spec: EpisodeSpec) -> Chunk:
    if chunk.ndim != 2 or len(chunk) == 0:
        raise InvalidActionError(
            f"{spec.key}: the policy returned shape {chunk.shape}; expected [execute >= 1, A]"
        )
    if not np.isfinite(chunk).all():
        raise InvalidActionError(f"{spec.key}: the policy returned actions that are not finite; check its weights")
    return chunk
