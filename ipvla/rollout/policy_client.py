"""A simulator worker's side of the policy service. It imports no torch: the worker has no model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray

from ipvla.rollout.episode import Chunk, EpisodeId
from ipvla.types import Observation


@dataclass
class PolicyClient:
    """Asks the policy actor that an episode is pinned to."""

    actor: Any

    def act(self, episode_id: EpisodeId, observation: Observation, policy_step: int) -> Chunk:
        """Float32 [execute, A]. StaleEpisodeError, in Ray's wrapping, if the step does not follow the last."""
        chunk: Chunk = ray.get(self.actor.act.remote(episode_id, policy_step, observation))
        return chunk

    def end(self, episode_id: EpisodeId) -> None:
        """Returns once the episode's memory is freed. The memory of a dead process counts as freed."""
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(self.actor.end.remote(episode_id))
