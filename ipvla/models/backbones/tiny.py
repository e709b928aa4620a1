"""The `tiny` backbone: TinyVLM behind the Backbone protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.protocol import (
    Backbone,
    BackboneConfig,
    BackboneOutput,
    Context,
    Embedded,
    KeysValues,
    answered,
    placed,
    require_prompts,
)
from ipvla.models.backbones.tiny_tokenizer import escaped, tiny_tokenizer, tokens_of, unescaped
from ipvla.models.features import Features, LayerStates
from ipvla.types import NO_TOKEN, ModelInputs

if TYPE_CHECKING:
    from ipvla.models.backbones.tiny_vlm import Past, TinyVLM


@BackboneConfig.register_subclass("tiny")
@dataclass(frozen=True)
class TinyConfig(BackboneConfig):
    """Sizes of the network.

    Attributes:
        width: D, a multiple of `heads`.
        layers: transformer layers.
        heads, mlp: attention heads and inner size of a layer.
        trunk_channels: channels of the visual trunk.
        trunk_blocks: residual blocks of the visual trunk (`ResidualTrunk`, for textured scenes of 96 pixels and
            more); 0 for two convolutions (`TinyTrunk`, for coloured shapes).
        visual_tokens: tokens that the trunk's centroids are read out into.
        max_prompt_tokens: longest prompt. Words of Recall's and LIBERO's instructions are a token each; others are
            spelled, a token a letter or, beyond ASCII, a byte. What is longer than a batch's longest prompt costs
            nothing.
        max_text_tokens: of prompt and reply together.
        pretrained: directory written by `TinyVLM.save_pretrained`, or None to start from random weights.
    """

    width: int = 128
    layers: int = 6
    heads: int = 4
    mlp: int = 256
    trunk_channels: int = 64
    visual_tokens: int = 8
    trunk_blocks: int = 0
    max_prompt_tokens: int = 32
    max_text_tokens: int = 64
    pretrained: Path | None = None

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"backbone.layers is {self.layers}; tiny needs at least 1")
        if not 2 <= self.max_prompt_tokens <= self.max_text_tokens:
            raise ValueError(
                f"backbone.max_prompt_tokens is {self.max_prompt_tokens}; tiny takes 2 to {self.max_text_tokens}, "
                "max_text_tokens"
            )
        if self.trunk_blocks < 0:
            raise ValueError(f"backbone.trunk_blocks is {self.trunk_blocks}; give 0 or more")
        if self.trunk_blocks and self.trunk_channels % 8:
            raise ValueError(
                f"backbone.trunk_channels is {self.trunk_channels}; residual blocks take multiples of 8"
            )
        if self.width % self.heads:
            raise ValueError(f"backbone.width {self.width} is not a multiple of backbone.heads {self.heads}")

    @property
    def text_limits(self) -> tuple[int, int] | None:
        return (self.max_prompt_tokens, self.max_text_tokens) if self.pretrained is None else None

    @property
    def split_layers(self) -> int | None:
        return self.layers if self.pretrained is None else None

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        if self.pretrained is not None and not (self.pretrained / "config.json").is_file():
            raise ValueError(
                f"backbone.pretrained {self.pretrained} holds no config.json; give a directory written by "
                "TinyVLM.save_pretrained"
            )
        lengths = {text: len(tokens_of(text)) + 1 for text in instructions}  # <act>
        require_prompts(lengths, self.max_prompt_tokens, self.max_text_tokens)

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> TinyBackbone:
        from ipvla.models.backbones.tiny_vlm import TinyVLM, TinyVLMConfig  # transformers takes seconds

        if self.pretrained is not None:
            return TinyBackbone(TinyVLM.from_pretrained(self.pretrained), self.max_prompt_tokens)
        config = TinyVLMConfig(
            image_size=image_size,
            num_views=num_views,
            proprio_dim=proprio_dim,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp,
            trunk_channels=self.trunk_channels,
            visual_tokens=self.visual_tokens,
            trunk_blocks=self.trunk_blocks,
            max_text_tokens=self.max_text_tokens,
        )
        return TinyBackbone(TinyVLM(config), self.max_prompt_tokens)


class TinyBackbone(Backbone):
    """Prompt: `<instruction> <act>`, cognition: state of `<act>`. Question: `<question> <sep>` answer `<eos>`."""

    layer_pattern = r"layers\.({layers})\."

    def __init__(self, vlm: TinyVLM, max_prompt_tokens: int = 32) -> None:
        super().__init__()
        self.vlm = vlm
        self.width = vlm.config.hidden_size
        self.perception_size = vlm.perception_size
        self.num_layers = vlm.config.num_hidden_layers
        self.vocabulary = vlm.config.vocab_size
        self.heads = vlm.config.num_attention_heads
        self.cache_size = self.width
        self.max_prompt_tokens = max_prompt_tokens
        self.max_text_tokens = vlm.config.max_text_tokens
        self.max_observation_tokens = vlm.text_start + max_prompt_tokens
        self.tokenizer = tiny_tokenizer()
        self._act, self._sep = self.tokenizer.convert_tokens_to_ids(["<act>", "<sep>"])

    def tokenize(self, instruction: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(f"{escaped(instruction)} <act>"))

    def calibrate(self, mean_image: torch.Tensor) -> None:
        self.network.trunk.calibrate(mean_image)

    def patches(self, num_views: int) -> tuple[int, int]:
        trunk = self.network.trunk
        return math.isqrt(len(trunk.grid)), self.network.config.trunk_channels

    def language_layers(self) -> list[nn.Module]:
        return list(self.network.layers)

    def tokenize_text(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(escaped(text)))

    def detokenize(self, ids: Sequence[int]) -> str:
        tokens = [i for i in ids if i != NO_TOKEN]
        return unescaped(cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True)).strip())

    def question(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(f"{escaped(text)} <sep>"))

    def embed(self, inputs: ModelInputs) -> Embedded:
        lengths = inputs.attention_mask.sum(-1)
        longest = int(lengths.max())  # columns of padding alone cost time and say nothing
        ids, valid = inputs.input_ids[:, :longest], inputs.attention_mask[:, :longest]
        tokens, seen = self.network.embed(inputs.images, inputs.proprio, ids, valid, self.fuse(inputs))
        start = self.network.text_start
        return Embedded(
            tokens=tokens,
            valid=F.pad(valid, (start, 0), value=True),
            last=lengths - 1 + start,
            perception=seen,
            proprio=inputs.proprio,
            instruction=F.pad(valid & (ids != self._act), (start, 0), value=False),
        )

    def encode(self, embedded: Embedded, context: Context | None = None) -> BackboneOutput:
        context = context or Context()
        place = placed(embedded, context, self.attention)
        hidden = self.network.run(place.tokens, place.valid[:, None, None], _by_layer(context.past))
        observed = hidden if place.written is None else tuple(h[:, place.observation] for h in hidden)
        layers = self.network.layers
        rows = torch.arange(len(embedded.last), device=embedded.last.device)
        last_keys_values = None
        if context.keep:
            places = embedded.last[:, None] - torch.arange(context.keep - 1, -1, -1, device=rows.device)
            pairs = [
                layer.keys_values(h[rows[:, None], places]) for layer, h in zip(layers, observed, strict=False)
            ]
            last_keys_values = torch.stack([k for k, _ in pairs], 1), torch.stack([v for _, v in pairs], 1)
        return BackboneOutput(
            Features(
                self.network.norm(observed[-1][rows, embedded.last]),
                embedded.perception,
                embedded.proprio,
                self.layer_states(observed, lambda i: layers[i].keys_values(observed[i]), embedded.valid),
            ),
            observed,
            embedded.instruction,
            None if place.written is None else hidden[-1][:, place.written],
            last_keys_values,
        )

    def extend(
        self, tokens: torch.Tensor, past: LayerStates, reads: torch.Tensor, keep: bool = False
    ) -> tuple[torch.Tensor, LayerStates]:
        hidden = self.network.run(tokens, reads, self._past(past))
        if keep:
            new = [layer.keys_values(h) for layer, h in zip(self.network.layers, hidden, strict=False)]
            past = past.followed(torch.stack([k for k, _ in new], 1), torch.stack([v for _, v in new], 1))
        return self.network.norm(hidden[-1]), past

    def last_layers(self, tokens: torch.Tensor, valid: torch.Tensor, past: LayerStates) -> torch.Tensor:
        earlier = self._past(past)
        hidden = self.network.run(tokens, valid[:, None, None], earlier, self.num_layers - len(earlier))
        return cast(torch.Tensor, self.network.norm(hidden[-1]))

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.network.embed_tokens(ids))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return states @ cast(torch.Tensor, self.network.embed_tokens.weight).T

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        prompts = replace(inputs, input_ids=self._asking(inputs))
        rows, suffix = answered(prompts, replies, self.tokenizer.eos_token_id)
        self._check_length(rows.shape[1])
        ids = rows.clamp(min=0)
        prefix = (rows != NO_TOKEN) & ~suffix
        x, _ = self.network.embed(inputs.images, inputs.proprio, ids, prefix, self.fuse(inputs))
        hidden = self.network.run(x, self.network.reply_mask(prefix, suffix))
        logits = self.network.lm_logits(hidden[-1][:, self.network.text_start :])
        asked = suffix[:, 1:]
        return F.cross_entropy(logits[:, :-1][asked].float(), ids[:, 1:][asked])

    @torch.no_grad()
    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        embedded = self.embed(replace(inputs, input_ids=self._asking(inputs)))
        lengths = inputs.attention_mask.sum(-1)
        self._check_length(int(lengths.max()) + max_new_tokens)
        hidden = self.network.run(embedded.tokens, embedded.valid[:, None, None])
        past = [layer.keys_values(h) for layer, h in zip(self.network.layers, hidden, strict=False)]
        bias = torch.zeros(embedded.valid.shape, device=embedded.valid.device)
        bias = bias.masked_fill(~embedded.valid, -torch.inf)[:, None].repeat(1, self.heads, 1)
        state = hidden[-1][torch.arange(len(lengths), device=lengths.device), embedded.last]
        alone = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lengths.device)
        going = torch.ones_like(lengths, dtype=torch.bool)
        written = torch.full((len(lengths), max_new_tokens), NO_TOKEN, device=lengths.device)
        ends = torch.tensor([self.tokenizer.eos_token_id, self.tokenizer.pad_token_id], device=lengths.device)
        for i in range(max_new_tokens):
            token = self.network.lm_logits(state).argmax(-1)
            going = going & ~torch.isin(token, ends)
            if not going.any():
                break
            written[:, i] = token.masked_fill(~going, NO_TOKEN)
            x = (self.network.embed_tokens(token) + self.network.positions[lengths + i])[:, None]
            hidden = self.network.run(x, alone, [(k, v, bias) for k, v in past])
            new = [layer.keys_values(h) for layer, h in zip(self.network.layers, hidden, strict=False)]
            past = [
                (torch.cat([k, nk], 1), torch.cat([v, nv], 1)) for (k, v), (nk, nv) in zip(past, new, strict=True)
            ]
            bias, state = F.pad(bias, (0, 1)), hidden[-1][:, 0]
        return written

    def _past(self, states: LayerStates) -> list[Past]:
        """What each of the layers of `states` reads besides, where it is valid."""
        bias = torch.zeros(states.valid.shape, device=states.valid.device).masked_fill(~states.valid, -torch.inf)
        bias = bias[:, None].expand(-1, self.heads, -1)
        return [(k, v, bias) for k, v in zip(states.keys.unbind(1), states.values.unbind(1), strict=True)]

    def _asking(self, inputs: ModelInputs) -> torch.Tensor:
        """The prompts' ids with `<sep>` for `<act>`: asking for words rather than for an action."""
        return inputs.input_ids.masked_fill(inputs.input_ids == self._act, self._sep)

    def _check_length(self, tokens: int) -> None:
        limit = self.network.config.max_text_tokens
        if tokens > limit:
            raise ValueError(f"prompt and reply take {tokens} tokens; shorten them to {limit}")


def _by_layer(past: KeysValues | None) -> list[Past] | None:
    if past is None:
        return None
    return [(k, v, past.bias) for k, v in zip(past.keys.unbind(1), past.values.unbind(1), strict=True)]
