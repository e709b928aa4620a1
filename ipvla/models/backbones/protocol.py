"""The Backbone protocol: a vision-language model that turns an observation into features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import draccus
import torch
from torch import nn

from ipvla.models.features import Features
from ipvla.types import ModelInputs


@dataclass
class BackboneOutput:
    """Features, and what lies behind them.

    Attributes:
        features: what memory and head read.
        hidden_states: the embeddings and every layer's output, num_layers + 1 tensors [B, N, D].
        instruction_mask: bool [B, N], True on the instruction's own tokens (no padding, no special tokens).
    """

    features: Features
    hidden_states: tuple[torch.Tensor, ...]
    instruction_mask: torch.Tensor


class Backbone(nn.Module):
    """What the rest of the house needs of a vision-language model.

    Attributes:
        vlm: the Hugging Face model itself; PEFT wraps this one.
        width: D, size of the cognition; perception_size: Dp, size of a visual token.
        num_layers: language layers; layer_pattern: regular expression of a language layer's module name,
            with `{layers}` where the layer numbers go.
        max_prompt_tokens: longest prompt in tokens.
    """

    vlm: Any  # a transformers.PreTrainedModel, whose classes are untyped
    width: int
    perception_size: int
    num_layers: int
    layer_pattern: str
    max_prompt_tokens: int

    def tokenize(self, instruction: str) -> list[int]:
        """The prompt of an instruction as token ids, special and image tokens included."""
        raise NotImplementedError

    def calibrate(self, mean_image: torch.Tensor) -> None:
        """Told the training data's mean image, float32 [3, H, W] in pixel values, before training begins."""

    def forward(self, inputs: ModelInputs) -> BackboneOutput:
        """Runs inputs with one leading axis [B]."""
        raise NotImplementedError

    def language_layers(self) -> list[nn.Module]:
        """The language layers, first to last, each a module whose output's first tensor is [B, N, D]."""
        raise NotImplementedError

    def answer_loss(self, inputs: ModelInputs, questions: list[str], answers: list[str]) -> torch.Tensor:
        """Next-token cross-entropy over the answers' tokens only; `inputs` gives images and proprioception."""
        raise NotImplementedError

    def answer(self, inputs: ModelInputs, questions: list[str], max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to questions about what `inputs` show."""
        raise NotImplementedError


@dataclass(frozen=True)
class BackboneConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the backbones of this folder."""

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> Backbone:
        raise NotImplementedError
