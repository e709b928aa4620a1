"""Auxiliary losses, beside the action's, from the reasoning and questions of a step; a rollout knows none of them.

That reasoning helps a policy that never writes it down in rollout is what ECoT-Lite found (Chen et al.,
arXiv 2505.08243).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.reasoning import without_last_part
from ipvla.types import NO_TOKEN, StepBatch

logger = logging.getLogger(__name__)
_NUMBERS = 1 << 32


@dataclass(frozen=True)
class PlanReadoutConfig:
    """tokens: longest plan, in the backbone's tokens; weight: of this loss beside the action's."""

    tokens: int = 16
    weight: float = 0.05

    def __post_init__(self) -> None:
        _check("plan_readout", self.weight, self.tokens)

    def build(self, width: int, vocabulary: int) -> PlanReadout:
        return PlanReadout(self, width, vocabulary)


class PlanReadout(nn.Module):
    """The plan's words, read from the cognition that memory has enriched.

    While a cue is shown and while the arm must wait, the action loss says nothing about what to remember.
    Demonstrations that carry reasoning do: at every step, each token of the plan that holds then is predicted from
    that step's enriched cognition z alone,

        logits of token i = (W_i norm(z)) . E / sqrt(D)
        loss = weight * mean cross-entropy over the plan's tokens

    with one W_i [D, D] per place i and word embeddings E of its own.
    """

    def __init__(self, config: PlanReadoutConfig, width: int, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.place = nn.Linear(width, config.tokens * width)
        self.words = nn.Embedding(vocabulary, width)

    def loss(self, cognition: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        """Of cognition [B, D] and plans int64 [B, Lp], NO_TOKEN past their ends; 0 if there is no plan at all."""
        asked = self.place(self.norm(cognition)).reshape(len(plan), -1, cognition.shape[-1])
        asked = asked[:, : plan.shape[1]]
        planned = plan != NO_TOKEN
        if not planned.any():
            return F.mse_loss(asked, asked)  # 0, with every weight in the graph
        logits = asked[planned] @ self.words.weight.T * cognition.shape[-1] ** -0.5
        loss: torch.Tensor = self.config.weight * F.cross_entropy(logits.float(), plan[planned])
        return loss


@dataclass(frozen=True)
class QuestionsConfig:
    """weight: of this loss beside the action's; share: of the steps asked, in (0, 1]; tokens: longest answer."""

    weight: float = 0.1
    share: float = 0.25
    tokens: int = 2

    def __post_init__(self) -> None:
        _check("questions", self.weight, self.tokens, self.share)

    def build(self) -> Questions:
        return Questions(self)


@dataclass
class Questions:
    """Questions about what the policy sees now, answered in words by the backbone itself.

    Demonstrations that carry questions do so at every step. A fixed share of the steps is asked,

        loss = weight * mean cross-entropy over the answers' tokens and their ends

    with the question as the prompt in the instruction's place. The memory takes no part, and no weight is added:
    it is a skill of the backbone alone, beside the actions, which later fine-tuning may keep or lose.
    """

    config: QuestionsConfig

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
        number = _hashed(_hashed(batch.episode_key) ^ batch.t)
        return (number < self.config.share * _NUMBERS) & batch.valid & (batch.answer != NO_TOKEN).any(-1)


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
        _check("reasoning_loss", self.weight, self.tokens, self.share)

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
    """The backbone writes the reasoning of a step, as in Embodied Chain-of-Thought (ECoT).

    The prompt is the policy's own, with the step's pictures, and the reply is what the dataset says about the step
    (Zawalski et al., arXiv 2407.08693),

        loss = weight * mean cross-entropy over the reasoning's tokens and their ends

    The memory takes no part, and no weight is added to the model: the language head is the backbone's own.
    """

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
        whole = _hashed((_hashed(batch.episode_key) * (batch.t + 1)).sum())
        number = _hashed(_hashed(batch.episode_key) ^ batch.t ^ whole)
        return (number < self.config.share * _NUMBERS) & batch.valid & (batch.plan != NO_TOKEN).any(-1)

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


def _check(setting: str, weight: float, tokens: int, share: float = 1.0) -> None:
    """ValueError for values that no such loss has."""
    if not weight > 0:
        raise ValueError(f"model.{setting}.weight is {weight}; it must be above 0, or set {setting} to null")
    if not 0 < share <= 1:
        raise ValueError(f"model.{setting}.share is {share}; it must lie in (0, 1], or set {setting} to null")
    if tokens < 1:
        raise ValueError(f"model.{setting}.tokens is {tokens}; it must be at least 1")


def _hashed(x: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2^32) of int64: each bit depends on all of the lower 32 (Mueller's finaliser)."""
    x = x & (_NUMBERS - 1)
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & (_NUMBERS - 1)
    return x ^ (x >> 16)
