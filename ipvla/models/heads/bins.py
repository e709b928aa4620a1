"""Actions as tokens: OpenVLA's 256 uniform bins (arXiv 2406.09246), decoded in parallel as in OpenVLA-OFT.

`numpy.digitize(a, linspace(-1, 1, 256))` gives d in 1..256, the bin is d - 1; decoding reads the centre of the bin
(there are 255), so a round trip errs by at most 1/255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.heads.protocol import Glimpse, GlimpseHeadConfig, Head, HeadConfig, masked_mean

NUM_BINS = 256


def action_bins(actions: torch.Tensor) -> torch.Tensor:
    """Normalised actions -> bin index int64 0..255; values outside [-1, 1] go to the outermost bins."""
    edges = torch.linspace(-1, 1, NUM_BINS, device=actions.device, dtype=torch.float64)
    return torch.bucketize(actions.double().clamp(-1, 1), edges, right=True) - 1


def bin_centres(bins: torch.Tensor) -> torch.Tensor:
    """Bin index int64 -> the bin's centre, float32 in (-1, 1); index 255 holds only 1.0 and reads as 254."""
    return ((bins.clamp(0, NUM_BINS - 2).double() + 0.5) * 2 / (NUM_BINS - 1) - 1).float()


@HeadConfig.register_subclass("bins")
@dataclass(frozen=True)
class BinsConfig(GlimpseHeadConfig):
    """See `GlimpseHeadConfig`."""

    bounded: ClassVar[bool] = True

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

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        loss = F.cross_entropy(self(features).flatten(0, 2), action_bins(actions).flatten(), reduction="none")
        return masked_mean(loss.view_as(actions), weight)
