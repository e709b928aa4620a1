"""A classifier of each action over the bins of `action_tokens.bins`, all at once, from one glimpse.

The language model writes nothing here; the head `tokens` has it write the bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.action_tokens.bins import NUM_BINS, action_bins, bin_centres
from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.heads.protocol import Glimpse, GlimpseHeadConfig, Head, HeadConfig, masked_mean


@HeadConfig.register_subclass("bins")
@dataclass(frozen=True)
class BinsConfig(GlimpseHeadConfig):
    """See `GlimpseHeadConfig`."""

    @property
    def bounded(self) -> bool:
        return True

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> BinsHead:
        return BinsHead(self, backbone, proprio, (chunk, action_dim))


class BinsHead(Head):
    """The logits of all C x A action tokens in one pass; `sample` takes the likeliest bin of each."""

    def __init__(self, config: BinsConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (*shape, NUM_BINS)
        self.glimpse = Glimpse(config, backbone, proprio)
        self.logits = nn.Linear(config.hidden, math.prod(self.shape))

    def forward(self, features: Features) -> torch.Tensor:
        """Logits float32 [B, C, A, 256]."""
        logits: torch.Tensor = self.logits(self.glimpse(features)).float().unflatten(-1, self.shape)
        return logits

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        return bin_centres(self(features).argmax(-1))

    def expected(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        logits = self(features)
        mean: torch.Tensor = logits.softmax(-1) @ bin_centres(torch.arange(NUM_BINS, device=logits.device))
        return mean

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        loss = F.cross_entropy(self(features).flatten(0, 2), action_bins(actions).flatten(), reduction="none")
        return masked_mean(loss.view_as(actions), weight)
