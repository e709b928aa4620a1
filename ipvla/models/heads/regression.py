"""Continuous chunk regression in one pass, as OpenVLA-OFT's head (arXiv 2502.19645).

OpenVLA-OFT trains it with L1. On the Recall suite the squared error learns sooner which of several places is
meant: while a policy is undecided between them, the median (L1) hardly moves with the evidence, the mean does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.heads.protocol import Glimpse, GlimpseHeadConfig, Head, HeadConfig, masked_mean
from ipvla.models.heads.quality import QualityConfig


@HeadConfig.register_subclass("regression")
@dataclass(frozen=True)
class RegressionConfig(GlimpseHeadConfig):
    """loss: "mse" or "l1"; quality: further terms of it, or null; the rest as in `GlimpseHeadConfig`."""

    loss: str = "mse"
    quality: QualityConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("l1", "mse"):
            raise ValueError(f'head.loss is {self.loss!r}; choose "l1" or "mse"')

    def check(self, chunk: int) -> None:
        if self.quality is not None:
            self.quality.check(chunk)

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> RegressionHead:
        return RegressionHead(self, backbone, proprio, (chunk, action_dim))


class RegressionHead(Head):
    """The whole chunk in one pass: glimpse, then one linear layer to [C, A]."""

    def __init__(self, config: RegressionConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        if config.quality is not None:
            config.quality.check(*shape)
        self.shape = shape
        self.glimpse = Glimpse(config, backbone, proprio)
        self.action = nn.Linear(config.hidden, math.prod(shape))

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        actions: torch.Tensor = self.action(self.glimpse(features)).float().unflatten(-1, self.shape)
        return actions

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        predicted = self.sample(features)
        error = predicted - actions
        loss = masked_mean(error.abs() if self.config.loss == "l1" else error.square(), weight)
        if self.config.quality is None:
            return loss
        quality = self.config.quality.loss(predicted, actions, weight)
        self.terms = {"quality": quality.detach()}
        return loss + quality
