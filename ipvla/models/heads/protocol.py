"""The Head protocol: from memory-augmented features to a chunk of actions; and what heads share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import draccus
import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features, Reads


class Head(nn.Module):
    """`weight` bool [B, C, A] is True where an action exists and its dimension varies in the dataset.

    A head draws nothing at random itself: what it needs comes in as `noise`, float32 [B, *shape], standard normal,
    each row drawn from its episode and control step. So a chunk does not depend on what else is in the batch.

    Attributes:
        noise_shape: of one row of what `sample` takes; None for a head that takes none.
        loss_noise_shape: of one row of what `loss` takes. In training another row is drawn in every epoch.
        writes: its actions are words behind the prompt, which the backbone reads one after another (`reply`).
    """

    noise_shape: tuple[int, ...] | None = None
    loss_noise_shape: tuple[int, ...] | None = None
    writes: bool = False

    def reply(self, actions: torch.Tensor) -> torch.Tensor | None:
        """Normalised actions [..., C, A] as words behind the prompt, int64 [..., La], which the backbone reads in
        training; None for a head that writes none."""
        return None

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scalar loss of normalised actions [B, C, A], averaged over `weight`."""
        raise NotImplementedError

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised actions float32 [B, C, A]."""
        raise NotImplementedError

    def expected(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """What a probe compares, float32 [B, C, A], differentiable: `sample`, or a mean where that chooses.

        Behind the features' prompts stands the `reply` of what `sample` gives.
        """
        return self.sample(features, noise)


@dataclass(frozen=True)
class HeadConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the heads of this folder.

    Attributes:
        bounded: it gives actions in [-1, 1] only.
    """

    bounded: ClassVar[bool] = False

    @property
    def reads(self) -> Reads:
        """The language layers of which the head finds states in `Features.layers`."""
        return Reads()

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> Head:
        """A head for features of this backbone's sizes and `proprio` dimensions; it keeps no backbone."""
        raise NotImplementedError


@dataclass(frozen=True)
class GlimpseHeadConfig(HeadConfig):
    """Of a head that reads a `Glimpse`: its width is `hidden`, and one glimpse looks at `queries` places."""

    hidden: int = 256
    queries: int = 6

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.queries < 1:
            raise ValueError(f"head.hidden {self.hidden} and head.queries {self.queries} must be at least 1")


class Glimpse(nn.Module):
    """What the (memory-augmented) cognition asks for, looked up among the visual tokens.

    Features -> one vector [B, H] that holds cognition, what was looked at, and the proprioception. Single-head
    cross-attention per query: softmax(W_q c . W_k v / sqrt(k)) v over the visual tokens, whose raw values
    (coordinates included) are read out, so a query can return a place.
    """

    def __init__(self, config: GlimpseHeadConfig, backbone: Backbone, proprio: int, key: int = 64) -> None:
        super().__init__()
        hidden, queries, perception = config.hidden, config.queries, backbone.perception_size
        self.queries = queries
        self.key_size = key
        self.ask = nn.Sequential(nn.LayerNorm(backbone.width), nn.Linear(backbone.width, hidden), nn.GELU())
        self.query = nn.Linear(hidden, queries * key)
        self.key = nn.Linear(perception, key)
        with torch.no_grad():
            self.key.weight *= 4  # sharp enough from the start to pick single cells
        self.out = nn.Sequential(nn.Linear(queries * perception + hidden + proprio, hidden), nn.GELU())

    def forward(self, features: Features) -> torch.Tensor:
        asked = self.ask(features.cognition)
        query = self.query(asked).unflatten(-1, (self.queries, self.key_size))
        score = query @ self.key(features.perception).transpose(1, 2) * self.key_size**-0.5
        glimpsed = score.float().softmax(-1).to(features.perception.dtype) @ features.perception
        out: torch.Tensor = self.out(torch.cat([glimpsed.flatten(1), asked, features.proprio.to(asked.dtype)], -1))
        return out


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 [B, *shape], each row drawn from its seed in [0, 2^63) alone; on the CPU.

    A generator for each row: what one draws for many rows, or on another device, may differ in the last bit.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, *shape)


def masked_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `weight` is True; 0 where nothing is, so that an idle window has no gradient."""
    return (values * weight).sum() / weight.sum().clamp(min=1)
