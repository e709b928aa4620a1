"""The `tiny` backbone: TinyVLM behind the Backbone protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.protocol import Backbone, BackboneConfig, BackboneOutput
from ipvla.models.backbones.tiny_tokenizer import tiny_tokenizer
from ipvla.models.backbones.tiny_vlm import TinyOutput, TinyVLM, TinyVLMConfig
from ipvla.models.features import Features
from ipvla.types import ModelInputs


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
        pretrained: directory written by `TinyVLM.save_pretrained`, or None to start from random weights.
    """

    width: int = 128
    layers: int = 6
    heads: int = 4
    mlp: int = 256
    trunk_channels: int = 64
    visual_tokens: int = 8
    pretrained: Path | None = None

    def __post_init__(self) -> None:
        if self.layers < 6:
            raise ValueError(f"backbone.layers is {self.layers}; tiny needs at least 6")
        if self.width % self.heads:
            raise ValueError(f"backbone.width {self.width} is not a multiple of backbone.heads {self.heads}")

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> TinyBackbone:
        if self.pretrained is not None:
            return TinyBackbone(TinyVLM.from_pretrained(self.pretrained))
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
        )
        return TinyBackbone(TinyVLM(config))


class TinyBackbone(Backbone):
    """Prompt: `<instruction> <act>`, cognition: state of `<act>`. Question: `<question> <sep>` answer `<eos>`."""

    layer_pattern = r"layers\.({layers})\."

    def __init__(self, vlm: TinyVLM) -> None:
        super().__init__()
        self.vlm = vlm
        self.width = vlm.config.hidden_size
        self.perception_size = vlm.perception_size
        self.num_layers = vlm.config.num_hidden_layers
        self.max_prompt_tokens = 16
        self.tokenizer = tiny_tokenizer()

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

    def forward(self, inputs: ModelInputs) -> BackboneOutput:
        lengths = inputs.attention_mask.sum(-1)
        longest = int(lengths.max())  # columns of padding alone cost time and say nothing
        ids, valid = inputs.input_ids[:, :longest], inputs.attention_mask[:, :longest]
        output: TinyOutput = self.vlm(inputs.images, inputs.proprio, ids, valid)
        last = lengths - 1 + output.text_start
        rows = torch.arange(len(last), device=last.device)
        cognition = self.network.norm(output.hidden_states[-1][rows, last])
        act = self.tokenizer.convert_tokens_to_ids("<act>")
        words = valid & (ids != act)
        return BackboneOutput(
            Features(cognition, output.perception, inputs.proprio),
            output.hidden_states,
            F.pad(words, (output.text_start, 0), value=False),
        )

    def answer_loss(self, inputs: ModelInputs, questions: list[str], answers: list[str]) -> torch.Tensor:
        prompts = [self._prompt(q) for q in questions]
        replies = [self.tokenizer.encode(f"{a} <eos>") for a in answers]
        logits, ids, suffix = self._run(inputs, prompts, replies)
        asked = suffix[:, 1:]
        return F.cross_entropy(logits[:, :-1][asked].float(), ids[:, 1:][asked])

    @torch.no_grad()
    def answer(self, inputs: ModelInputs, questions: list[str], max_new_tokens: int = 8) -> list[str]:
        prompts = [self._prompt(q) for q in questions]
        replies: list[list[int]] = [[] for _ in prompts]
        end = self.tokenizer.eos_token_id
        for _ in range(max_new_tokens):
            logits, _, _ = self._run(inputs, prompts, replies)
            for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
                if not reply or reply[-1] != end:
                    reply.append(int(logits[row, len(prompt) + len(reply) - 1].argmax()))
            if all(reply[-1] == end for reply in replies):
                break
        return [cast(str, self.tokenizer.decode([i for i in r if i != end])).strip() for r in replies]

    def _prompt(self, question: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(f"{question} <sep>"))

    def _run(
        self, inputs: ModelInputs, prompts: list[list[int]], replies: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [B, L, vocab], ids [B, L] and the answer's mask [B, L] of prompts followed by replies."""
        length = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
        limit = self.network.config.max_text_tokens
        if length > limit:
            raise ValueError(f"question and answer take {length} tokens; shorten them to {limit}")
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        suffix = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            ids[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
            suffix[row, len(prompt) : len(prompt) + len(reply)] = True
        ids, suffix = ids.to(inputs.images.device), suffix.to(inputs.images.device)
        output = self.vlm(inputs.images, inputs.proprio, ids, ids != 0, suffix)
        return self.network.lm_logits(output.hidden_states[-1][:, output.text_start :]), ids, suffix
