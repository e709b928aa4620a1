"""What a simulator holds of the policy service: where its episode's memory is. Without torch: it has no model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from ipvla.rollout.episode import Chunk
from ipvla.types import Observation


@dataclass(frozen=True)
class Moved:
    """The answer to a request for an episode that goes on elsewhere."""

    actor: Any


@dataclass
class PolicyClient:
    """What a simulator worker holds of the policy actor that its episode is pinned to; follows where it moves."""

    actor: Any

    def act(self, episode_id: str, observation: Observation, policy_step: int) -> Chunk:
        """Float32 [execute, A]. StaleEpisodeError, in Ray's wrapping, if the step does not follow the last."""
        chunk: Chunk = self._ask(lambda actor: actor.act.remote(episode_id, policy_step, observation))
        return chunk

    def end(self, episode_id: str) -> None:
        """Returns once the episode's memory is freed; it was freed if the process that had it is dead."""
        with contextlib.suppress(ray.exceptions.RayActorError):
            self._ask(lambda actor: actor.end.remote(episode_id))

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        while isinstance(answer := ray.get(call(self.actor)), Moved):
            self.actor = answer.actor
        return answer
