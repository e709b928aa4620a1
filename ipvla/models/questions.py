"""An auxiliary loss: questions about what the policy sees now, answered in words by the backbone itself.

Demonstrations that carry questions do so at every step. A fixed share of the steps is asked,

    loss = weight * mean cross-entropy over the answers' tokens and their ends

with the question as the prompt in the instruction's place. The memory takes no part, and no weight is added: it is
a skill of the backbone alone, beside the actions, which later fine-tuning may keep or lose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipvla.models.backbones import Backbone
from ipvla.types import NO_TOKEN, StepBatch

_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class QuestionsConfig:
    """weight: of this loss beside the action's; share: of the steps asked, in (0, 1]; tokens: longest answer."""

    weight: float = 0.1
    share: float = 0.25
    tokens: int = 2

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(
                f"model.questions.weight is {self.weight}; it must be above 0, or set questions to null"
            )
        if not 0 < self.share <= 1:
            raise ValueError(
                f"model.questions.share is {self.share}; it must lie in (0, 1]; set questions to null to ask none"
            )
        if self.tokens < 1:
            raise ValueError(f"model.questions.tokens is {self.tokens}; it must be at least 1")

    def build(self) -> Questions:
        return Questions(self)


class Questions:
    """See the module's docstring."""

    def __init__(self, config: QuestionsConfig) -> None:
        self.config = config

    def loss(self, backbone: Backbone, batch: StepBatch) -> torch.Tensor:
        """A scalar; 0 where no step of the window is asked. A function of weights and batch alone."""
        asked = self.asked(batch).flatten()
        if not asked.any():
            return torch.zeros((), device=asked.device)
        inputs = batch.inputs.flatten().map(lambda x: x[asked])
        question, answer = (x.flatten(0, 1)[asked] for x in (batch.question, batch.answer))
        return self.config.weight * backbone.write_loss(inputs.with_prompt(question), answer)

    def asked(self, batch: StepBatch) -> torch.Tensor:
        """bool [B, K]: which steps are asked, by a hash of episode and control step."""
        drawn = hashed(hashed(batch.episode_key) ^ batch.t) < self.config.share * (_32_BITS + 1)
        return drawn & batch.valid & (batch.answer != NO_TOKEN).any(-1)


def hashed(x: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2^32) of int64: each bit depends on all of the lower 32 (Mueller's finaliser)."""
    x = x & _32_BITS
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _32_BITS
    return x ^ (x >> 16)
