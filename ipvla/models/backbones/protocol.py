"""The Backbone protocol: a vision-language model that turns an observation into features.

A forward pass has two halves: `embed` (vision and prompt to tokens, independent of any memory) and `encode` (the
language layers, which may read what memory puts before them). A training window embeds all its steps at once even
where memory makes the second half go step by step.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import draccus
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ipvla.models.features import Features, LayerStates, Reads
from ipvla.models.fusion import Fusion
from ipvla.types import NO_TOKEN, ModelInputs


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
        extra: what else the backbone's `encode` needs, each tensor [B, ...]: positions of several axes (M-RoPE),
            features for later layers (DeepStack).
        padding: name -> the value that pads the tensor of `extra` along its axis 1, at the end, where it is put
            beside a longer one; a tensor that is not named has the same shape in every batch.
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    last: torch.Tensor
    perception: torch.Tensor
    proprio: torch.Tensor
    instruction: torch.Tensor
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    padding: Mapping[str, float] = field(default_factory=dict)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same record with `function` applied to each tensor."""
        changed: dict[str, Any] = {"extra": {name: function(x) for name, x in self.extra.items()}}
        for name in ("tokens", "valid", "last", "perception", "proprio", "instruction"):
            changed[name] = function(getattr(self, name))
        return replace(self, **changed)

    @classmethod
    def joined(cls, blocks: Sequence[Self]) -> Self:
        """Several batches [B_i, ...] as one, shorter ones padded at the end, as prompts are."""
        extra, padding = blocks[0].extra, blocks[0].padding
        return cls(
            tokens=_joined([block.tokens for block in blocks], 0),
            valid=_joined([block.valid for block in blocks], False),
            last=torch.cat([block.last for block in blocks]),
            perception=torch.cat([block.perception for block in blocks]),
            proprio=torch.cat([block.proprio for block in blocks]),
            instruction=_joined([block.instruction for block in blocks], False),
            extra={name: _joined([block.extra[name] for block in blocks], padding.get(name)) for name in extra},
            padding=padding,
        )

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
        tokens: [B, M, D] or None, further tokens, which the observation's tokens read and which read these; where
            they stand for that is `Backbone.attention`'s to say.
        past: keys and values that every token may read besides.
        keep: of how many of the prompt's last tokens to return keys and values.
    """

    tokens: torch.Tensor | None = None
    past: KeysValues | None = None
    keep: int = 0


@dataclass
class BackboneOutput:
    """Features, and the states that they come from.

    Attributes:
        features: what memory and head read.
        hidden_states: the embeddings and every layer's output, num_layers + 1 tensors [B, N, D].
        instruction_mask: bool [B, N], True on the instruction's own tokens (no padding, no special tokens).
        context_tokens: [B, M, D], the last hidden states of the context's tokens after they have read the
            observation, if there are any.
        last_keys_values: (keys, values) [B, layers, keep, Dk] of the prompt's last tokens, for `Context.keep` > 0.
    """

    features: Features
    hidden_states: tuple[torch.Tensor, ...]
    instruction_mask: torch.Tensor
    context_tokens: torch.Tensor | None = None
    last_keys_values: tuple[torch.Tensor, torch.Tensor] | None = None


class Backbone(nn.Module):
    """What the rest of the house needs of a vision-language model.

    Attributes:
        vlm: the Hugging Face model itself; PEFT wraps this one.
        width: D, size of the cognition; perception_size: Dp, size of a visual token.
        num_layers: language layers; layer_pattern: regular expression of a language layer's module name,
            with `{layers}` where the layer numbers go.
        max_prompt_tokens: longest prompt in tokens.
        max_text_tokens: of prompt and reply together, None for no limit.
        max_observation_tokens: most tokens of an observation, of a backbone that has `last_layers`.
        vocabulary: number of token ids.
        heads, cache_size: attention heads, and Dk, the size of one token's cached keys in one layer.
        key_heads: into how many heads the Dk numbers are divided; None for `heads`.
        attention: "prefix" if every token of an observation reads every other: context tokens then stand behind
            the prompt, once. "causal" if a token reads those before it only: context tokens then stand in front of
            the observation, which reads them, and once more behind it, where they read it (`placed`).
        reads: the layers of which `encode` puts states into the features; set where the model is built.
        insulated: in training, features are detached before a memory behind the backbone reads them.
        state_in_prompt: the prompt has the normalised state in words: `tokenize_with_state` makes it.
        fusion: how points reach visual tokens, set where the model is built; None for a model without points.
    """

    attention: ClassVar[Literal["prefix", "causal"]] = "prefix"
    reads: Reads = Reads()
    insulated: bool = False
    state_in_prompt: bool = False
    fusion: Fusion | None

    vlm: Any  # a transformers.PreTrainedModel, whose classes are untyped
    width: int
    perception_size: int
    num_layers: int
    layer_pattern: str
    max_prompt_tokens: int
    max_text_tokens: int | None = None
    max_observation_tokens: int = 0
    vocabulary: int
    heads: int
    cache_size: int
    key_heads: int | None = None

    @property
    def network(self) -> Any:
        """`vlm`, without what PEFT has wrapped around it."""
        return self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm

    def __init__(self) -> None:
        super().__init__()
        self.fusion = None

    def patches(self, num_views: int) -> tuple[int, int] | None:
        """The side g of a picture's g x g visual tokens, row by row, and their width; None if there are none."""
        return None

    def fuse(self, inputs: ModelInputs) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Visual tokens [B, V * g * g, D] -> the same with what the points of `inputs` say; None without fusion.

        ValueError if the inputs have no points.
        """
        fusion, points = self.fusion, inputs.points
        if fusion is None:
            return None
        if points is None:
            raise ValueError("model.fusion reads points, and inputs have none; give observations with geometry")
        return lambda tokens: fusion(tokens, points.flatten(1, 3))

    def tokenize(self, instruction: str) -> list[int]:
        """The prompt of an instruction as token ids, special and image tokens included."""
        raise NotImplementedError

    def tokenize_with_state(self, instruction: str, state: npt.NDArray[np.float32]) -> list[int]:
        """The prompt of an instruction with the normalised state [P] in words."""
        raise NotImplementedError

    def tokenize_text(self, text: str) -> list[int]:
        """Plain text as token ids, nothing added: a plan, say, to stand in a prompt before its last token."""
        raise NotImplementedError

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; NO_TOKEN and special tokens are left out."""
        raise NotImplementedError

    def save_description(self, directory: Path) -> None:
        """Writes what, beside settings and weights, is needed to build it again (a tokenizer) into a policy's
        directory; nothing where settings and weights are all. `BackboneConfig.beside` finds it there."""

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

    def extend(
        self, tokens: torch.Tensor, past: LayerStates, reads: torch.Tensor, keep: bool = False
    ) -> tuple[torch.Tensor, LayerStates]:
        """Runs the language layers over further tokens behind an observation, which is not computed again.

        Args:
            tokens: [B, M, D], before the first language layer. Row b's first one stands at the position behind
                the `past.valid[b].sum()` tokens before it.
            past: keys and values of every layer of what stands before; the tokens read all of it that is valid.
            reads: bool [M, M], which of the M tokens (columns) each of them (rows) reads.
            keep: return what stands before the next token, these tokens included; else `past` itself.

        Returns:
            The last hidden states [B, M, D], as `logits` takes them, and the keys and values.
        """
        raise NotImplementedError

    def last_layers(self, tokens: torch.Tensor, valid: torch.Tensor, past: LayerStates) -> torch.Tensor:
        """Runs the last n language layers alone; for a backbone whose config has `split_layers`.

        Args:
            tokens: [B, M, D], as they enter the first of these layers.
            valid: bool [B, M], False on padding.
            past: keys and values [B, n, N, Dk] that the tokens read besides.

        Returns:
            The last hidden states [B, M, D], as `logits` takes them.
        """
        raise NotImplementedError

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [...] as [..., D], before the first language layer."""
        raise NotImplementedError

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., D] of `extend` -> logits [..., vocabulary]."""
        raise NotImplementedError

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        """Next-token cross-entropy of replies to the prompts of `inputs`.

        Replies are int64 [B, L], NO_TOKEN past their ends, without an end token: the loss adds it.
        """
        raise NotImplementedError

    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        """Greedy replies to the prompts of `inputs`, int64 [B, max_new_tokens], NO_TOKEN from the end token on.

        The prompt's keys and values are computed once.
        """
        raise NotImplementedError

    def answer_loss(self, inputs: ModelInputs, questions: list[str], answers: list[str]) -> torch.Tensor:
        """`write_loss` of answers to questions about what `inputs` show, whose own prompts are left out."""
        replies = [self.tokenize_text(answer) for answer in answers]
        return self.write_loss(self.question_inputs(inputs, questions), padded(replies).to(inputs.images.device))

    def answer(self, inputs: ModelInputs, questions: list[str], max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to questions about what `inputs` show."""
        replies = self.write(self.question_inputs(inputs, questions), max_new_tokens)
        return [self.detokenize(reply) for reply in replies.tolist()]

    def question_inputs(self, inputs: ModelInputs, questions: list[str]) -> ModelInputs:
        """The same observations with questions for prompts."""
        prompts = padded([self.question(question) for question in questions])
        return inputs.with_prompt(prompts.to(inputs.images.device))

    def question(self, text: str) -> list[int]:
        """The prompt of a question as token ids."""
        raise NotImplementedError

    def layer_states(
        self,
        hidden: Sequence[torch.Tensor],
        keys_values: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        valid: torch.Tensor,
    ) -> LayerStates | None:
        """What `encode` puts into `Features.layers`.

        Args:
            hidden: the embeddings and every layer's output, num_layers + 1 tensors [B, N, D] of the observation.
            keys_values: a layer's number -> its keys and values of these tokens, each [B, N, Dk].
            valid: bool [B, N].
        """
        if not self.reads:
            return None
        reads = self.reads.of(self.num_layers)
        pairs = [keys_values(layer) for layer in reads.keys_values or ()]
        keys, values = ([pair[i] for pair in pairs] for i in (0, 1))
        batch, tokens = valid.shape

        def stack(states: Sequence[torch.Tensor], size: int) -> torch.Tensor:
            return torch.stack(list(states), 1) if states else hidden[0].new_zeros(batch, 0, tokens, size)

        return LayerStates(
            stack([hidden[layer] for layer in reads.hidden or ()], self.width),
            stack(keys, self.cache_size),
            stack(values, self.cache_size),
            valid,
        )


def require_prompts(lengths: Mapping[str, int], longest: int, most: int | None = None) -> None:
    """ValueError that names the setting if one of the prompts is too long.

    Args:
        lengths: instruction -> tokens of its prompt.
        longest: the setting's value.
        most: what the setting may be at most, if there is such a bound.
    """
    too_long = {instruction: length for instruction, length in lengths.items() if length > longest}
    if not too_long:
        return
    needed = max(too_long.values())
    example = textwrap.shorten(max(too_long, key=lambda instruction: too_long[instruction]), 100)
    remedy = f"set --model.backbone.max_prompt_tokens {needed}"
    if most is not None and needed > most:
        remedy = (
            f"this backbone takes {most} at most: raise model.backbone.max_text_tokens as well, which makes new "
            "weights, shorten the instruction, or choose another backbone"
        )
    raise ValueError(
        f"the prompts of {len(too_long)} of {len(lengths)} instructions have more tokens than "
        f"model.backbone.max_prompt_tokens {longest}, up to {needed}: {example!r}; {remedy}"
    )


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [B, L], NO_TOKEN past the rows' ends."""
    ids = torch.full((len(rows), max(map(len, rows))), NO_TOKEN)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids


def answered(prompts: ModelInputs, replies: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their replies behind them, for `write_loss`.

    Args:
        replies: int64 [B, La], NO_TOKEN past their ends.
        end: the token that ends a reply.

    Returns:
        int64 [B, L], NO_TOKEN past the ends; and bool [B, L], True on the replies and their end tokens.
    """
    lengths = prompts.attention_mask.sum(-1)
    each = zip(prompts.input_ids.tolist(), lengths.tolist(), replies.tolist(), strict=True)
    rows = [[*ids[:n], *(token for token in reply if token != NO_TOKEN), end] for ids, n, reply in each]
    ids = padded(rows).to(replies.device)
    place = torch.arange(ids.shape[1], device=ids.device)
    return ids, (place >= lengths[:, None]) & (ids != NO_TOKEN)


@dataclass(frozen=True)
class Placed:
    """An observation's tokens with the context's among them.

    Attributes:
        tokens, valid: [B, N', D] and bool [B, N'].
        observation: where the observation's tokens stand among the N'.
        written: where the context's tokens stand that have read the observation; None without a context.
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    observation: slice
    written: slice | None


def placed(embedded: Embedded, context: Context, attention: Literal["prefix", "causal"]) -> Placed:
    """Puts the context's tokens where `Backbone.attention` has them."""
    x, valid, n = embedded.tokens, embedded.valid, embedded.tokens.shape[1]
    if context.tokens is None:
        return Placed(x, valid, slice(0, n), None)
    tokens, m = context.tokens.to(x.dtype), context.tokens.shape[1]
    front = m if attention == "causal" else 0
    before = [tokens] if front else []
    return Placed(
        torch.cat([*before, x, tokens], 1),
        F.pad(valid, (front, m), value=True),
        slice(front, front + n),
        slice(front + n, front + n + m),
    )


def _joined(blocks: Sequence[torch.Tensor], padding: float | None) -> torch.Tensor:
    """Along axis 0, after each was padded along axis 1 to the longest; None for blocks of one shape."""
    if padding is None:
        return torch.cat(list(blocks))
    longest = max(block.shape[1] for block in blocks)
    return torch.cat(
        [
            F.pad(block, (*(0, 0) * (block.ndim - 2), 0, longest - block.shape[1]), value=padding)
            for block in blocks
        ]
    )


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
    """A choice by `type`: one of the backbones of this folder."""

    @property
    def text_limits(self) -> tuple[int, int] | None:
        """`Backbone.max_prompt_tokens` and `max_text_tokens`; None without a limit, or if the weights tell it."""
        return None

    @property
    def split_layers(self) -> int | None:
        """Language layers of which the last ones can run alone (`Backbone.last_layers`); None if they cannot."""
        return None

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        """What can be known without the network, for prompts of these tasks in words with so many pictures.

        Raises:
            ValueError: a prompt has more tokens than the model takes, or the weights are not what they should be.
        """

    def beside(self, policy: Path) -> Self:
        """The same, of the files that `Backbone.save_description` has written into a policy's directory."""
        return self

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> Backbone:
        """Weights that are not there yet are on the device `meta`: those of a saved policy take their places."""
        raise NotImplementedError
