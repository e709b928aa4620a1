"""The Backbone protocol: a vision-language model that turns an observation into features.

A forward pass has two halves: `embed` (vision and prompt to tokens, independent of any memory) and `encode` (the
language layers, which may read what memory puts before them). A training window embeds all its steps at once even
where memory makes the second half go step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, ClassVar, Self

import draccus
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ipvla.models.features import Features
from ipvla.types import ModelInputs


@dataclass
class Embedded:
    """Observations as tokens, before the first language layer.

    Attributes:
        tokens: [B, N, D].
        valid: bool [B, N], False on padding.
        last: int64 [B], index of the prompt's last token, whose state becomes the cognition.
        perception: [B, Np, Dp], visual tokens.
        proprio: [B, P].
        instruction: bool [B, N], True on the instruction's own tokens (no padding, no special tokens).
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    last: torch.Tensor
    perception: torch.Tensor
    proprio: torch.Tensor
    instruction: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same record with `function` applied to each tensor."""
        return type(self)(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def at(self, k: int) -> Self:
        """A window's step `k`: [B, K, ...] -> [B, ...]."""
        return self.map(lambda x: x[:, k])


@dataclass
class KeysValues:
    """Cached attention keys and values of S earlier tokens, for every language layer.

    Attributes:
        keys, values: [B, layers, S, Dk], Dk = `Backbone.cache_size`, as the attention of that layer computed them.
        bias: float32 [B, heads, S], added to the attention scores; -inf hides an entry.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


@dataclass
class Context:
    """What memory puts before the language layers.

    Attributes:
        tokens: [B, M, D] or None, further tokens behind the prompt: all tokens read them, and they read all.
        past: keys and values that every token may read besides.
        keep: of how many of the prompt's last tokens to return keys and values.
    """

    tokens: torch.Tensor | None = None
    past: KeysValues | None = None
    keep: int = 0


@dataclass
class BackboneOutput:
    """Features, and what lies behind them.

    Attributes:
        features: what memory and head read.
        hidden_states: the embeddings and every layer's output, num_layers + 1 tensors [B, N, D].
        instruction_mask: bool [B, N], True on the instruction's own tokens (no padding, no special tokens).
        context_tokens: [B, M, D], the last hidden states of the context's tokens, if it had any.
        kept: (keys, values) [B, layers, keep, Dk] of the prompt's last tokens, if they were asked for.
    """

    features: Features
    hidden_states: tuple[torch.Tensor, ...]
    instruction_mask: torch.Tensor
    context_tokens: torch.Tensor | None = None
    kept: tuple[torch.Tensor, torch.Tensor] | None = None


class Backbone(nn.Module):
    """What the rest of the house needs of a vision-language model.

    Attributes:
        vlm: the Hugging Face model itself; PEFT wraps this one.
        width: D, size of the cognition; perception_size: Dp, size of a visual token.
        num_layers: language layers; layer_pattern: regular expression of a language layer's module name,
            with `{layers}` where the layer numbers go.
        max_prompt_tokens: longest prompt in tokens.
        max_text_tokens: of prompt and reply together, None for no limit.
        vocabulary: number of token ids.
        heads, cache_size: attention heads, and Dk, the size of one token's cached keys in one layer.
    """

    vlm: Any  # a transformers.PreTrainedModel, whose classes are untyped
    width: int
    perception_size: int
    num_layers: int
    layer_pattern: str
    max_prompt_tokens: int
    max_text_tokens: int | None = None
    vocabulary: int
    heads: int
    cache_size: int

    def tokenize(self, instruction: str) -> list[int]:
        """The prompt of an instruction as token ids, special and image tokens included."""
        raise NotImplementedError

    def tokenize_text(self, text: str) -> list[int]:
        """Plain text as token ids, nothing added: a plan, say, to stand in a prompt before its last token."""
        raise NotImplementedError

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; padding and special tokens are left out."""
        raise NotImplementedError

    def calibrate(self, mean_image: torch.Tensor) -> None:
        """Told the training data's mean image, float32 [3, H, W] in pixel values, before training begins."""

    def embed(self, inputs: ModelInputs) -> Embedded:
        """Inputs with one leading axis [B] as tokens."""
        raise NotImplementedError

    def encode(self, embedded: Embedded, context: Context | None = None) -> BackboneOutput:
        """Runs the language layers."""
        raise NotImplementedError

    def forward(self, inputs: ModelInputs, context: Context | None = None) -> BackboneOutput:
        """`embed`, then `encode`."""
        return self.encode(self.embed(inputs), context)

    def language_layers(self) -> list[nn.Module]:
        """The language layers, first to last, each a module whose output's first tensor is [B, N, D]."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """From now on a language layer in training keeps its inputs alone, and runs again in the backward pass.

        Hooks of the layer itself stay outside and act once.
        """
        for layer in self.language_layers():
            layer.forward = _run_again_in_backward(layer)

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        """Next-token cross-entropy of replies int64 [B, L] to the prompts of `inputs`, 0-padded, without an end
        token: the loss adds it."""
        raise NotImplementedError

    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        """Greedy replies to the prompts of `inputs`, int64 [B, max_new_tokens], 0 from the end token on.

        The prompt's keys and values are computed once.
        """
        raise NotImplementedError

    def answer_loss(self, inputs: ModelInputs, questions: list[str], answers: list[str]) -> torch.Tensor:
        """`write_loss` of answers to questions about what `inputs` show, whose own prompts are left out."""
        replies = [self.tokenize_text(answer) for answer in answers]
        return self.write_loss(self._asked(inputs, questions), padded(replies).to(inputs.images.device))

    def answer(self, inputs: ModelInputs, questions: list[str], max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to questions about what `inputs` show."""
        return [self.detokenize(r) for r in self.write(self._asked(inputs, questions), max_new_tokens).tolist()]

    def _asked(self, inputs: ModelInputs, questions: list[str]) -> ModelInputs:
        ids = padded([self.question(question) for question in questions]).to(inputs.images.device)
        return replace(inputs, input_ids=ids, attention_mask=ids != 0)

    def question(self, text: str) -> list[int]:
        """The prompt of a question as token ids."""
        raise NotImplementedError


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [B, L], 0-padded at the end."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids


def _run_again_in_backward(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward

    @wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return checkpointed


@dataclass(frozen=True)
class BackboneConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the backbones of this folder.

    Attributes:
        layers_write_cache: a language layer adds to the keys and values that it is given: to run it again for the
            backward pass would add them twice.
    """

    layers_write_cache: ClassVar[bool] = False

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> Backbone:
        raise NotImplementedError
