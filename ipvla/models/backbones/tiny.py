"""The `tiny` backbone: TinyVLM behind the Backbone protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
    padded,
)
from ipvla.models.features import Features
from ipvla.types import ModelInputs

if TYPE_CHECKING:
    from ipvla.models.backbones.tiny_vlm import Past, TinyOutput, TinyVLM


@BackboneConfig.register_subclass("tiny")
@dataclass(frozen=True)
class TinyConfig(BackboneConfig):
    """Sizes of the network.

    Attributes:
        width: D, a multiple of `heads`.
        layers: transformer layers, at least 6 (the last four are the ones that forgetting methods hook).
        heads, mlp: attention heads and inner size of a layer.
        trunk_channels: channels of the visual trunk.
        visual_tokens: tokens that the trunk's centroids are read out into.
        max_prompt_tokens: longest prompt. Recall's words are a token each; others are spelled, a token a letter.
        max_text_tokens: of prompt and reply together.
        pretrained: directory written by `TinyVLM.save_pretrained`, or None to start from random weights.
    """

    width: int = 128
    layers: int = 6
    heads: int = 4
    mlp: int = 256
    trunk_channels: int = 64
    visual_tokens: int = 8
    max_prompt_tokens: int = 16
    max_text_tokens: int = 64
    pretrained: Path | None = None

    def __post_init__(self) -> None:
        if self.layers < 6:
            raise ValueError(f"backbone.layers is {self.layers}; tiny needs at least 6")
        if not 2 <= self.max_prompt_tokens <= self.max_text_tokens:
            raise ValueError(
                f"backbone.max_prompt_tokens is {self.max_prompt_tokens}; tiny takes 2 to {self.max_text_tokens}, "
                "max_text_tokens"
            )
        if self.width % self.heads:
            raise ValueError(f"backbone.width {self.width} is not a multiple of backbone.heads {self.heads}")

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
            max_text_tokens=self.max_text_tokens,
        )
        return TinyBackbone(TinyVLM(config), self.max_prompt_tokens)


class TinyBackbone(Backbone):
    """Prompt: `<instruction> <act>`, cognition: state of `<act>`. Question: `<question> <sep>` answer `<eos>`."""

    layer_pattern = r"layers\.({layers})\."

    def __init__(self, vlm: TinyVLM, max_prompt_tokens: int = 16) -> None:
        from ipvla.models.backbones.tiny_tokenizer import tiny_tokenizer

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
        self.tokenizer = tiny_tokenizer()
        self._act, self._sep = self.tokenizer.convert_tokens_to_ids(["<act>", "<sep>"])

    @property
    def network(self) -> Any:
        """The TinyVLM, also when PEFT has wrapped it."""
        return self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm

    def tokenize(self, instruction: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(f"{instruction} <act>"))

    def calibrate(self, mean_image: torch.Tensor) -> None:
        self.network.trunk.mean_image.copy_(mean_image)

    def language_layers(self) -> list[nn.Module]:
        return list(self.network.layers)

    def tokenize_text(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        return cast(str, self.tokenizer.decode([i for i in ids if i], skip_special_tokens=True)).strip()

    def question(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(f"{text} <sep>"))

    def embed(self, inputs: ModelInputs) -> Embedded:
        lengths = inputs.attention_mask.sum(-1)
        longest = int(lengths.max())  # columns of padding alone cost time and say nothing
        ids, valid = inputs.input_ids[:, :longest], inputs.attention_mask[:, :longest]
        tokens, seen = self.network.embed(inputs.images, inputs.proprio, ids, valid)
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
        x, valid, n = embedded.tokens, embedded.valid, embedded.tokens.shape[1]
        if context.tokens is not None:
            x = torch.cat([x, context.tokens.to(x.dtype)], 1)
            valid = F.pad(valid, (0, context.tokens.shape[1]), value=True)
        hidden = self.network.run(x, valid[:, None, None], _by_layer(context.past))
        rows = torch.arange(len(x), device=x.device)
        kept = None
        if context.keep:
            places = embedded.last[:, None] - torch.arange(context.keep - 1, -1, -1, device=x.device)
            pairs = [
                layer.keys_values(h[rows[:, None], places])
                for layer, h in zip(self.network.layers, hidden, strict=False)
            ]
            kept = torch.stack([k for k, _ in pairs], 1), torch.stack([v for _, v in pairs], 1)
        return BackboneOutput(
            Features(self.network.norm(hidden[-1][rows, embedded.last]), embedded.perception, embedded.proprio),
            tuple(h[:, :n] for h in hidden) if x.shape[1] > n else hidden,
            embedded.instruction,
            hidden[-1][:, n:] if context.tokens is not None else None,
            kept,
        )

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        lengths = inputs.attention_mask.sum(-1)
        replied = (replies != 0).sum(-1)
        prompts = self._asking(inputs)
        rows = [
            [*ids[:n], *reply[:m], self.tokenizer.eos_token_id]
            for ids, n, reply, m in zip(
                prompts.tolist(), lengths.tolist(), replies.tolist(), replied.tolist(), strict=True
            )
        ]
        ids = padded(rows).to(replies.device)
        self._check_length(ids.shape[1])
        place = torch.arange(ids.shape[1], device=ids.device)
        suffix = (place >= lengths[:, None]) & (ids != 0)
        output: TinyOutput = self.vlm(inputs.images, inputs.proprio, ids, ids != 0, suffix)
        logits = self.network.lm_logits(output.hidden_states[-1][:, output.text_start :])
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
        written = torch.zeros(len(lengths), max_new_tokens, dtype=torch.long, device=lengths.device)
        for i in range(max_new_tokens):
            token = self.network.lm_logits(state).argmax(-1)
            going = going & (token != self.tokenizer.eos_token_id) & (token != 0)
            if not going.any():
                break
            written[:, i] = token * going
            x = (self.network.embed_tokens(token) + self.network.positions[lengths + i])[:, None]
            hidden = self.network.run(x, alone, [(k, v, bias) for k, v in past])
            new = [layer.keys_values(h) for layer, h in zip(self.network.layers, hidden, strict=False)]
            past = [
                (torch.cat([k, nk], 1), torch.cat([v, nv], 1)) for (k, v), (nk, nv) in zip(past, new, strict=True)
            ]
            bias, state = F.pad(bias, (0, 1)), hidden[-1][:, 0]
        return written

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
