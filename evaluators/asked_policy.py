"""A policy that is asked single questions: one observation, an empty memory, a named noise; here or behind openpi.

Answers are chunks in the units of training, so that numbers of an action weigh alike: what is a distance between
two of them is comparable between policies of the same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ipvla.contract import ContractError, from_environment
from ipvla.data.conventions import Conventions
from ipvla.data.dataset import EpisodeDataset
from ipvla.data.geometry import PointTerms
from ipvla.data.standards.standard import EncodedEpisode
from ipvla.policy import Policy
from ipvla.rollout.openpi.client import OpenpiClient, OpenpiSource
from ipvla.types import Observation

FloatArray = npt.NDArray[np.float64]


class AskedPolicy(Protocol):
    """Who is asked."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """That it looks through."""

    @property
    def points(self) -> PointTerms | None:
        """What its observations must have geometry for; None for pictures alone."""

    @property
    def takes_noise(self) -> bool | None:
        """Whether its answer depends on the noise that an observation's `episode` names; None if nobody knows."""

    @property
    def varies(self) -> npt.NDArray[np.bool_]:
        """bool [A], numbers of an action that change in its data; the others say nothing."""

    def fits(self, instruction: str) -> bool:
        """Whether its prompt is long enough."""

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        """float64 [B, C, A], each from an empty memory."""

    def targets(self, episode: EncodedEpisode, t: int, length: int) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """What was done from control step t of a recorded episode: float64 [C, A], and bool [C] of them.

        Args:
            length: C of its answers.
        """

    def close(self) -> None: ...


@dataclass(frozen=True)
class LoadedPolicy:
    """An `AskedPolicy` of this process."""

    policy: Policy

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.policy.transforms.cameras

    @property
    def points(self) -> PointTerms | None:
        return self.policy.transforms.points

    @property
    def takes_noise(self) -> bool:
        return self.policy.model.head.noise_shape is not None

    @property
    def varies(self) -> npt.NDArray[np.bool_]:
        varies: npt.NDArray[np.bool_] = self.policy.model.action_varies.cpu().numpy()
        return varies

    def fits(self, instruction: str) -> bool:
        try:
            self.policy.require_prompts([instruction])
        except ValueError:
            return False
        return True

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        model = self.policy.model
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            memory = self.policy.initial_memory(len(observations))
            chunks, _ = self.policy.act_normalised(observations, memory)
        model.train(was_training)
        answered: FloatArray = chunks.double().cpu().numpy()
        return answered

    def targets(self, episode: EncodedEpisode, t: int, length: int) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        target, valid = self.policy.transforms.chunk_targets(episode.action, t, episode.state)
        return target.astype(np.float64), valid

    def close(self) -> None:
        """There is nothing to free."""


@dataclass
class ServedPolicy:
    """An `AskedPolicy` behind an openpi server. Answers are normalised as training on this dataset would do it.

    Raises:
        ContractError: our server's policy does not fit the dataset.
        OpenpiError: it does not answer.
    """

    source: OpenpiSource
    dataset: EpisodeDataset

    def __post_init__(self) -> None:
        offered = self.dataset.contract
        self._view = view = self.source.view(offered, f"dataset {self.dataset.name}")
        if view.pictures != offered.pictures or view.state not in (offered.state, "none"):
            raise ContractError(
                f"the policy at {self.source.url} reads pictures {view.pictures} and state {view.state}, dataset "
                f"{self.dataset.name} holds {offered.pictures} and {offered.state}; give data recorded alike"
            )
        self._client = OpenpiClient(self.source.url, self.source.token)
        statistics = self.dataset.statistics()
        self._conventions = Conventions(statistics, view.cameras, 0, chunk=1, gripper=offered.gripper)

    @property
    def cameras(self) -> tuple[str, ...]:
        return self._view.cameras

    @property
    def points(self) -> PointTerms | None:
        return PointTerms() if self._view.geometry else None

    @property
    def takes_noise(self) -> None:
        return None

    @property
    def varies(self) -> npt.NDArray[np.bool_]:
        return ~self._conventions.statistics.constant

    def fits(self, instruction: str) -> bool:
        """A server says so itself, when it is asked."""
        return True

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        answers = np.stack([self._client.ask(observation) for observation in observations])
        gripper = self._conventions.gripper
        actions = answers if self._view.gripper == gripper else from_environment(answers, gripper)
        normalised = self._conventions.statistics.action.normalise(actions, self._conventions.normalisation)
        return np.asarray(normalised, np.float64)

    def targets(self, episode: EncodedEpisode, t: int, length: int) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        target, valid = replace(self._conventions, chunk=length).chunk_targets(episode.action, t)
        return target.astype(np.float64), valid

    def close(self) -> None:
        self._client.end()
