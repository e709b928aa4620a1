"""An auxiliary loss: the backbone writes the reasoning of a step, as in Embodied Chain-of-Thought (ECoT).

The prompt is the policy's own, with the step's pictures, and the reply is what the dataset says about the step
(Zawalski et al., arXiv 2407.08693),

    loss = weight * mean cross-entropy over the reasoning's tokens and their ends

The memory takes no part, and no weight is added to the model: the language head is the backbone's own. A rollout
does not write the reasoning; that policies are better for having learned to is what ECoT-Lite found (Chen et al.,
arXiv 2505.08243).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from ipvla.models.backbones import Backbone
from ipvla.models.questions import hashed
from ipvla.reasoning import without_last_part
from ipvla.types import NO_TOKEN, StepBatch

logger = logging.getLogger(__name__)
_32_BITS = 1 << 32


@dataclass(frozen=True)
class ReasoningLossConfig:
    """How reasoning is trained on.

    Attributes:
        weight: of this loss beside the action's, above 0.
        share: of the steps with reasoning, in (0, 1], drawn anew for every batch: the loss runs the language
            layers a second time.
        tokens: of the longest reasoning, in the backbone's tokens; a longer one loses its last tags.
    """

    weight: float = 0.1
    share: float = 0.25
    tokens: int = 512

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"model.reasoning_loss.weight is {self.weight}; it must be above 0, or set reasoning_loss to null"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"model.reasoning_loss.share is {self.share}; it must lie in (0, 1]")
        if self.tokens < 1:
            raise ValueError(f"model.reasoning_loss.tokens is {self.tokens}; it must be at least 1")

    def check(self, max_prompt_tokens: int, max_text_tokens: int | None) -> None:
        """ValueError if a backbone of these limits cannot read that many tokens behind its longest prompt."""
        if max_text_tokens is not None and max_prompt_tokens + self.tokens + 1 > max_text_tokens:
            most = max_text_tokens - max_prompt_tokens - 1
            raise ValueError(
                f"model.reasoning_loss.tokens is {self.tokens}; this backbone has {max_text_tokens} places for "
                f"prompt, reasoning and end, and its prompt may take {max_prompt_tokens}: lower it to {most}, or "
                "raise model.backbone.max_text_tokens"
            )

    def build(self, backbone: Backbone) -> ReasoningLoss:
        """ValueError as `check`."""
        self.check(backbone.max_prompt_tokens, backbone.max_text_tokens)
        return ReasoningLoss(self)


@dataclass
class ReasoningLoss:
    """See the module's docstring."""

    config: ReasoningLossConfig
    _warned: bool = field(default=False, init=False)

    def loss(self, backbone: Backbone, batch: StepBatch) -> torch.Tensor | None:
        """The mean cross-entropy, unweighted; None if no step is drawn. A function of weights and batch alone."""
        drawn = self.drawn(batch).flatten()
        if not drawn.any():
            return None
        inputs = batch.inputs.flatten().map(lambda x: x[drawn])
        return backbone.write_loss(inputs, batch.plan.flatten(0, 1)[drawn])

    def drawn(self, batch: StepBatch) -> torch.Tensor:
        """bool [B, K]: which steps are trained on, by a hash of episode, control step and the whole batch."""
        whole = hashed((hashed(batch.episode_key) * (batch.t + 1)).sum())
        number = hashed(hashed(batch.episode_key) ^ batch.t ^ whole)
        return (number < self.config.share * _32_BITS) & batch.valid & (batch.plan != NO_TOKEN).any(-1)

    def tokenize(self, backbone: Backbone, text: str) -> list[int]:
        """The reasoning's tokens, without last tags if there are more than `tokens`; [] if one tag alone has."""
        ids = backbone.tokenize_text(text)
        if len(ids) > self.config.tokens and not self._warned:
            logger.warning(
                "a reasoning of %d tokens loses its last tags to fit model.reasoning_loss.tokens %d",
                len(ids),
                self.config.tokens,
            )
            self._warned = True
        while len(ids) > self.config.tokens:
            text = without_last_part(text)
            ids = backbone.tokenize_text(text) if text else []
        return ids
