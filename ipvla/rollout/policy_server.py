"""A policy and the memory of every episode that is under way. Plain Python: no Ray, no queue."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ipvla.models.action_tokens import ActionTokenError
from ipvla.rollout.episode import Answer, Chunk, EpisodeId, InvalidActionError
from ipvla.types import THOUGHT_T, Memory, Observation


class BatchPolicy(Protocol):
    """What a rollout needs of a policy; `ipvla.policy.Policy` in production."""

    @property
    def execute(self) -> int:
        """Actions of a chunk that are played before the policy is asked again."""

    def initial_memory(self, batch: int) -> Memory: ...

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        """B observations and their memories -> float32 [B, C, A] in the simulator's units, next memories."""


@dataclass
class ActTime:
    """Time of all `act` calls so far, also of those that raised: wall time, and CPU time of the calling thread."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Adds the time of the block inside."""
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.wall_s += time.perf_counter() - began_s
            self.cpu_s += time.thread_time() - cpu_began_s


class StaleEpisodeError(RuntimeError):
    """A request does not follow its episode's last one: an answer would corrupt the memory."""


class CapacityError(RuntimeError):
    """There is no room for another episode."""


@dataclass
class _Episode:
    memory: Memory  # one row: [1, ...]
    next_step: int = 0
    waiting: bool = False
    heard_s: float = 0.0


@dataclass(frozen=True)
class Request:
    """An admitted observation of one episode."""

    episode: _Episode
    observation: Observation


class PolicyServer:
    """Batches requests of several episodes through one forward pass; each episode has its own memory row.

    `admit` checks a request's place in its episode, `forward` answers admitted requests, `end` frees the row. An
    episode without a request for a lease's time is freed by `expire`: its simulator is gone. Only `forward`
    may run in another thread than the rest: it touches nothing but its own requests.

    Args:
        capacity: episodes that may be under way at a time; None for no limit.
        lease_s: seconds.
        acting: gets the time of the policy's answers.
    """

    def __init__(
        self,
        policy: BatchPolicy,
        capacity: int | None = None,
        lease_s: float = 900.0,
        acting: ActTime | None = None,
    ) -> None:
        self._policy, self._capacity, self._lease_s = policy, capacity, lease_s
        self._acting = acting or ActTime()
        self._episodes: dict[EpisodeId, _Episode] = {}

    def __len__(self) -> int:
        return len(self._episodes)

    def __contains__(self, episode_id: EpisodeId) -> bool:
        return episode_id in self._episodes

    @property
    def full(self) -> bool:
        return self._capacity is not None and len(self._episodes) >= self._capacity

    def admit(
        self, episode_id: EpisodeId, policy_step: int, observation: Observation, now_s: float = 0.0
    ) -> Request:
        """Opens the episode at policy step 0, and takes the steps after it in order, one at a time.

        An observation that does not name its episode gets `episode_id` for its name.

        Args:
            now_s: seconds on the clock of `expire`.

        Raises:
            CapacityError: a new episode, for which there is no room.
            StaleEpisodeError: the episode is unknown, or the step is skipped, repeated, or still being answered.
        """
        episode = self._episodes.get(episode_id)
        if episode is None and policy_step == 0:
            if self.full:
                raise CapacityError(f"{episode_id}: {len(self)} episodes are under way; wait until one has ended")
            episode = self._episodes[episode_id] = _Episode(self._policy.initial_memory(1))
        if episode is None:
            raise StaleEpisodeError(
                f"{episode_id}: policy step {policy_step} of an episode with no memory here (ended, or the "
                "policy was restarted); run the episode again from its seed as a new attempt"
            )
        if episode.waiting or policy_step != episode.next_step:
            state = "is still being answered" if episode.waiting else "comes next"
            raise StaleEpisodeError(
                f"{episode_id}: got policy step {policy_step}, but step {episode.next_step} {state}; "
                "run the episode again from its seed as a new attempt"
            )
        episode.waiting, episode.heard_s = True, now_s
        if not observation.episode:
            observation = replace(observation, episode=episode_id.episode)
        return Request(episode, observation)

    @torch.inference_mode()
    def forward(self, requests: Sequence[Request]) -> list[Chunk | Answer | InvalidActionError]:
        """One batched pass; float32 [execute, A] per request, or what is wrong with its actions.

        A request with something `ahead` is answered with the whole chunk, and one to a policy at two speeds with
        what its chunk rests on. The memory of an episode whose actions are wrong is as before, and every one's if
        the policy raises. Where tokens mean no action, each request is answered by itself, so that the others' are
        played.
        """
        try:
            return self._forward(requests)
        except ActionTokenError as error:
            if len(requests) > 1:
                return [answer for request in requests for answer in self.forward([request])]
            return [InvalidActionError(f"{requests[0].observation.episode}: {error}")]

    def _forward(self, requests: Sequence[Request]) -> list[Chunk | Answer | InvalidActionError]:
        episodes = [request.episode for request in requests]
        try:
            memory = _gather([episode.memory for episode in episodes])
            with self._acting.measure():
                actions, memory = self._policy.act([request.observation for request in requests], memory)
            rows = _scatter(memory, len(episodes))
            thoughts = memory[THOUGHT_T].tolist() if THOUGHT_T in memory else [None] * len(episodes)
            timed = [request.observation.ahead is not None for request in requests]
            chunks = [
                chunk if whole else chunk[: self._policy.execute]
                for chunk, whole in zip(actions, timed, strict=True)
            ]
            finite = [bool(np.isfinite(chunk).all()) for chunk in chunks]
            for episode, row, good in zip(episodes, rows, finite, strict=True):
                if good:
                    episode.memory, episode.next_step = row, episode.next_step + 1
        finally:
            for episode in episodes:
                episode.waiting = False
        answers = [
            chunk if thought is None and not whole else Answer(chunk, self._policy.execute, thought)
            for chunk, whole, thought in zip(chunks, timed, thoughts, strict=True)
        ]
        return [
            answer if good else InvalidActionError.not_finite(request.observation.episode)
            for answer, good, request in zip(answers, finite, requests, strict=True)
        ]

    def end(self, episode_id: EpisodeId) -> None:
        """Frees the episode's memory; an unknown episode has none to free."""
        self._episodes.pop(episode_id, None)

    def expire(self, now_s: float) -> list[EpisodeId]:
        """Frees the episodes whose lease has run out, and names them."""
        silent = [
            name
            for name, episode in self._episodes.items()
            if not episode.waiting and now_s - episode.heard_s > self._lease_s
        ]
        for name in silent:
            del self._episodes[name]
        return silent


def _gather(rows: Sequence[Memory]) -> Memory:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _scatter(memory: Memory, batch: int) -> list[Memory]:
    # A view would keep the whole batch's storage alive for as long as its slowest episode.
    return [{name: tensor[i : i + 1].clone() for name, tensor in memory.items()} for i in range(batch)]
