"""One episode, closed loop: observe, ask the policy for a chunk, play it, until the task is decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ipvla.rollout.episode_log import EpisodeLog
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
    simulator: Simulator,
    spec: EpisodeSpec,
    act: Act,
    observers: Sequence[EpisodeObserver] = (),
    observe: Callable[[], Observation] | None = None,
) -> EpisodeResult:
    """Plays `spec` from its seed to its end; at most `simulator.task.horizon` control steps.

    Args:
        observe: what `act` is shown, where that is not what the simulator renders.

    Raises:
        InvalidActionError: a chunk is empty, has no action axis, or is not finite.
    """
    log, outcome = EpisodeLog(), StepOutcome(success=False, failure=False)
    simulator.reset(spec.seed)
    for observer in observers:
        observer.on_reset(simulator)
    while not outcome.done and log.steps < simulator.task.horizon:
        observation = (observe or simulator.observe)()
        with log.answer():
            chunk = _checked(act(observation, log.policy_steps), spec)
        for action in chunk[: simulator.task.horizon - log.steps]:
            with log.step(action):
                outcome = simulator.step(action)
            for observer in observers:
                observer.on_step(simulator, action, outcome)
            if outcome.done:
                break
    return log.result(spec, outcome, simulator.details())


def _checked(chunk: Chunk, spec: EpisodeSpec) -> Chunk:
    if chunk.ndim != 2 or len(chunk) == 0:
        raise InvalidActionError(
            f"{spec.key}: the policy returned shape {chunk.shape}; expected [execute >= 1, A]"
        )
    if not np.isfinite(chunk).all():
        raise InvalidActionError(f"{spec.key}: the policy returned actions that are not finite; check its weights")
    return chunk
