"""The transforms between environment and model units: one object, used by training and rollout alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from ipvla.contract import Contract
from ipvla.data.conventions import Conventions, FloatArray, IntArray
from ipvla.data.prompt_encoder import PromptEncoder
from ipvla.data.statistics import Statistics
from ipvla.types import NO_TOKEN, ModelInputs, Observation


@dataclass(frozen=True)
class Transforms:
    """Observations to model inputs, actions to targets, and model outputs back to actions.

    Attributes:
        conventions: what the data fix.
        prompts: what the backbone fixes.
    """

    conventions: Conventions
    prompts: PromptEncoder

    @property
    def statistics(self) -> Statistics:
        return self.conventions.statistics

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.conventions.cameras

    @property
    def chunk(self) -> int:
        return self.conventions.chunk

    @property
    def action_dim(self) -> int:
        return self.conventions.action_dim

    @property
    def contract(self) -> Contract:
        """See `Conventions.contract`."""
        return self.conventions.contract

    def of(self, dataset: str) -> Self:
        """The transforms of one dataset of a mixture, or the only ones. ValueError if it is not in the mixture."""
        return replace(self, conventions=self.conventions.of(dataset))

    def inputs(self, observations: Sequence[Observation]) -> ModelInputs:
        """One row per observation: leading axis [B]. ValueError for a missing camera or too long a prompt."""
        ids = np.stack([self.prompts.prompt(o.instruction) for o in observations])
        return ModelInputs(
            images=self.conventions.images(observations),
            proprio=self.conventions.proprio(observations),
            input_ids=torch.from_numpy(ids.clip(min=0)),
            attention_mask=torch.from_numpy(ids != NO_TOKEN),
        )

    def require_prompt(self, instruction: str) -> None:
        """ValueError if the instruction's prompt is too long."""
        self.prompts.prompt(instruction)

    def chunk_targets(self, action: FloatArray, t: int | IntArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """See `Conventions.chunk_targets`."""
        return self.conventions.chunk_targets(action, t)

    def denormalise(self, actions: npt.NDArray[np.floating[Any]] | torch.Tensor) -> FloatArray:
        """See `Conventions.denormalise`."""
        return self.conventions.denormalise(actions)

    def to_dict(self) -> dict[str, Any]:
        """Both halves as JSON values, without the tokenizers. `Conventions.from_dict` reads its own."""
        return {**self.conventions.to_dict(), **self.prompts.to_dict()}
