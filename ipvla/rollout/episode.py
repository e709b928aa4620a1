"""One episode, closed loop: observe, ask the policy for a chunk, play it, until the task is decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from ipvla.contract import Contract
from ipvla.rollout.chunk_player import ChunkPlayer, Pace
from ipvla.rollout.recorder import EpisodeLog
from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import EpisodeResult, EpisodeSpec, Observation

#: Float [E, A], E >= 1: the actions to play before the policy is asked again.
Chunk = npt.NDArray[np.float32]


class Answer(NamedTuple):
    """A chunk with more to say; to an observation with something `ahead` it is the whole one.

    Attributes:
        chunk: [E, A], E >= `execute`.
        execute: actions until the next call.
        thought_t: of a policy at two speeds, the control step of the observation that the slow part's thought
            rests on; None of others.
    """

    chunk: Chunk
    execute: int
    thought_t: int | None = None


#: (observation, policy step counted from 0) -> what is played until the next one.
Act = Callable[[Observation, int], Chunk | Answer]
#: A world that waits.
_PLAIN = Pace()


class EpisodeId(NamedTuple):
    """One attempt at an episode: a rerun never meets the memory of the attempt before it.

    Attributes:
        episode: an `EpisodeSpec.key`, or a session's name.
        attempt: counted from 0.
    """

    episode: str
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.episode}#{self.attempt}"


class EpisodeObserver(Protocol):
    """Watches an episode (video, traces) and changes nothing in it."""

    def on_reset(self, simulator: Simulator) -> None: ...
    def on_step(self, simulator: Simulator, action: npt.NDArray[np.float32], outcome: StepOutcome) -> None: ...


class InvalidActionError(ValueError):
    """The policy's chunk cannot be played."""

    @classmethod
    def not_finite(cls, episode: str) -> Self:
        return cls(f"{episode}: the policy returned actions that are not finite; check its weights")


class ReplayError(ValueError):
    """The recorded actions lead to another end here than in the recording."""


def run_episode(
    simulator: Simulator,
    spec: EpisodeSpec,
    act: Act,
    observers: Sequence[EpisodeObserver] = (),
    observe: Callable[[], Observation] | None = None,
    execute: int | None = None,
    pace: Pace = _PLAIN,
    terms: Contract | None = None,
) -> EpisodeResult:
    """Plays `spec` from its seed to its end; at most `simulator.task.horizon` control steps.

    Args:
        observe: the observation that `act` gets, where that is not what the simulator renders.
        execute: actions of every chunk that are played before the policy is asked again; None for all.
        pace: how late answers come, and how one takes over from another.
        terms: on which the robot is moved, for one that must keep still while it waits.

    Raises:
        InvalidActionError: a chunk is empty or shorter than `execute`, has no action axis, or is not finite.
        ValueError: the robot must keep still, and nothing tells how.
    """
    player = ChunkPlayer(pace, spec.key, terms)
    log, outcome = EpisodeLog(), StepOutcome(success=False, failure=False)
    simulator.reset(spec.seed)
    for observer in observers:
        observer.on_reset(simulator)
    while not outcome.done and log.steps < simulator.task.horizon:
        observation = player.asks((observe or simulator.observe)())
        with log.answer():
            answer = _checked(act(observation, log.policy_steps), spec, execute)
        if not pace.plain:
            log.late(player.delay)
        if answer.thought_t is not None:
            log.thought(answer.thought_t)
        left = simulator.task.horizon - log.steps
        for action, call in islice(player.play(observation, answer.chunk, answer.execute), left):
            with log.step(action, call):
                outcome = simulator.step(action)
            for observer in observers:
                observer.on_step(simulator, action, outcome)
            if outcome.done:
                break
    return log.result(spec, outcome, simulator.details())


def replay_episode(
    simulator: Simulator,
    recorded: EpisodeResult,
    actions: npt.NDArray[np.float32],
    observers: Sequence[EpisodeObserver] = (),
) -> None:
    """Plays `actions`, [T, A], from the episode's seed, with observers.

    Raises:
        ReplayError: the episode does not end as `recorded` (another version of the physics, another processor), or
            its actions are not finite.
    """
    if not np.isfinite(actions).all():
        raise ReplayError(f"the recorded actions of {recorded.spec.key} are not finite; its journal is damaged")
    outcome, steps = StepOutcome(success=False, failure=False), 0
    simulator.reset(recorded.spec.seed)
    for observer in observers:
        observer.on_reset(simulator)
    for action in actions:
        outcome, steps = simulator.step(action), steps + 1
        for observer in observers:
            observer.on_step(simulator, action, outcome)
        if outcome.done:
            break
    if (outcome.verdict, steps) != (recorded.outcome, recorded.steps):
        raise ReplayError(
            f"{recorded.spec.key} ended as {recorded.outcome} after {recorded.steps} control steps, its actions "
            f"now lead to {outcome.verdict} after {steps}; replay it where it was played, with the same versions"
        )


def _checked(answer: Chunk | Answer, spec: EpisodeSpec, execute: int | None) -> Answer:
    if not isinstance(answer, Answer):
        answer = Answer(answer, len(answer) if answer.ndim else 0)
    chunk, given = answer.chunk, answer.execute
    if chunk.ndim != 2 or len(chunk) == 0:
        raise InvalidActionError(
            f"{spec.key}: the policy returned shape {chunk.shape}; expected [execute >= 1, A]"
        )
    if execute is not None and given < execute:
        raise InvalidActionError(
            f"{spec.key}: the policy gives {given} actions per call, the protocol plays {execute}; "
            "evaluate a policy that executes as many, or by another protocol"
        )
    if not np.isfinite(chunk).all():
        raise InvalidActionError.not_finite(spec.key)
    return answer._replace(execute=execute or given)
