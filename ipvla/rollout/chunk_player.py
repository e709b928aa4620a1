"""Which action is played at a control step where answers come late: chunks, and how far each has been played.

A call at control step t is answered d steps later. In k of these d steps the last chunk is played, and in the
others the robot keeps still. The answer's action i belongs to the i-th step that moves the robot from t on, so it
is played from its action k on: with `hold` k is 0, with `rest` it is d, unless the last chunk ends before. The
policy is asked again once `execute` of the answer's actions are over, its own or those played in their place:

    rest, d = 2, execute = 4    t      0   1   2   3   4   5   6   7   8   9  10
                                asks   a                       b               c
                                plays  -   -  a0  a1  a2  a3  a4  a5  b2  b3  b4
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ipvla.contract import Contract
from ipvla.rollout.chunking import Chunk, ChunkingConfig, HeadFacts, SwitchConfig
from ipvla.rollout.latency import Latency, hold_action
from ipvla.types import Observation

Action = npt.NDArray[np.float32]


class Played(NamedTuple):
    """An action [A], and the call whose answer it is, counted from 0; None where the robot keeps still."""

    action: Action
    call: int | None


@dataclass(frozen=True)
class Pace:
    """How late answers come, and how one takes over from another."""

    latency: Latency = field(default_factory=Latency)
    chunking: ChunkingConfig = field(default_factory=SwitchConfig)

    def __post_init__(self) -> None:
        if self.chunking.continues and self.latency.longest and self.latency.meanwhile != "rest":
            raise ValueError(
                f"success.chunking.type {self.chunking.kind} goes on from the last chunk's rest, and "
                f"success.meanwhile is {self.latency.meanwhile}; set it to rest"
            )

    @property
    def plain(self) -> bool:
        """Does the world wait, and one chunk follow the other?"""
        return not self.latency.longest and isinstance(self.chunking, SwitchConfig)

    def require_plain(self, what: str) -> None:
        """ValueError in one line unless the world waits: `what` happens in no other, as "memory is probed"."""
        if not self.plain:
            raise ValueError(
                f"success.latency_steps and success.chunking: {what} in a world that waits; leave them out"
            )

    def conditions(self) -> dict[str, str]:
        """What a result's fingerprint says of it; nothing of a plain one, so that earlier results stay valid."""
        told = {"latency": str(self.latency), "chunking": str(self.chunking)}
        return {name: value for name, value in told.items() if value}

    def require(self, chunk: int, execute: int, head: HeadFacts) -> None:
        """ValueError in one line unless a policy can be played so.

        Args:
            chunk: actions per call, C.
            execute: of them those after which it is asked again.
        """
        if self.plain:
            return
        delay, kind = self.latency.longest, self.chunking.kind
        if delay > chunk:
            raise ValueError(
                f"success.latency_steps is {delay}, and a chunk has {chunk} actions: all of them would be over "
                f"when it arrives; set it to at most {chunk}"
            )
        if self.chunking.overlaps and execute >= chunk:
            raise ValueError(
                f"success.chunking.type {kind} needs chunks that overlap, and the policy plays all {chunk} "
                "actions before it is asked again; choose switch, or train with lanes.stride below model.chunk"
            )
        left = chunk - max(execute, delay)
        if self.chunking.continues and delay > left:
            raise ValueError(
                f"success.latency_steps is {delay}, and of a chunk of {chunk} only {left} actions are left when "
                f"the policy is asked again; set it to at most {min(chunk - execute, chunk // 2)} for {kind}"
            )
        self.chunking.check(delay, head)


@dataclass
class _Under:
    """A chunk [C, A] under way; `position` is that of its next action."""

    call: int
    chunk: Chunk
    position: int

    @property
    def left(self) -> Chunk:
        return self.chunk[self.position :]


class ChunkPlayer:
    """The chunks of one episode: `asks`, then `play`, for every call of the policy.

    Args:
        episode: an `EpisodeSpec.key`, from which latencies are drawn.
        terms: on which the robot is moved; None where it never has to keep still.
    """

    def __init__(self, pace: Pace, episode: str, terms: Contract | None = None) -> None:
        self._pace, self._episode, self._terms = pace, episode, terms
        self._calls = 0
        self._under_way: list[_Under] = []  # the oldest first
        self._last: Action | None = None

    @property
    def delay(self) -> int:
        """Control steps from the next answer's observation to its first action."""
        return self._pace.latency.drawn(self._episode, self._calls)

    def asks(self, observation: Observation) -> Observation:
        """What the policy is shown. How long it will take nobody knows: it is told the longest latency."""
        if self._pace.plain:
            return observation
        rest = self._under_way[-1].left if self._under_way else np.zeros((0, 0), np.float32)
        return replace(observation, ahead=self._pace.chunking.ahead(rest, self._pace.latency.longest))

    def play(self, observation: Observation, chunk: Chunk, execute: int) -> Iterator[Played]:
        """What is played from the observation of a call to that of the next one.

        Args:
            chunk: the answer, [C, A].
            execute: 1 <= execute <= C, of its actions those after which the policy is asked again.

        Raises:
            ValueError: the robot must keep still, and nothing tells how.
        """
        call, skipped = self._calls, 0
        delay, rest = self.delay, self._pace.latency.meanwhile == "rest"
        self._calls += 1
        for _ in range(delay):
            if rest and self._under_way:
                skipped += 1
                yield self._next()
            else:
                yield self._still(observation)
        answer = _Under(call, chunk, skipped)
        older = self._under_way if self._pace.chunking.averages else []
        self._under_way = [*older, answer]
        while answer.position < execute:
            yield self._next()

    def _next(self) -> Played:
        action = self._pace.chunking.merged([one.left[0] for one in self._under_way])
        call = self._under_way[-1].call
        for one in self._under_way:
            one.position += 1
        self._under_way = [one for one in self._under_way if len(one.left)]
        self._last = action
        return Played(action, call)

    def _still(self, observation: Observation) -> Played:
        if self._terms is None:
            raise ValueError("success.latency_steps: nothing tells what keeps this robot still")
        self._last = hold_action(self._terms, observation, self._last)
        return Played(self._last, None)
