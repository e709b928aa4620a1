"""A head outside of the package: a flow whose velocity is an MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.heads import HeadConfig
from ipvla.models.heads.flow_matching import Conditions, FlowMatchingConfig, FlowMatchingHead


@HeadConfig.register_subclass("small_flow")
@dataclass(frozen=True)
class SmallFlowConfig(FlowMatchingConfig):
    """See `FlowMatchingConfig`."""

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> SmallFlowHead:
        return SmallFlowHead(self, backbone, proprio, (chunk, action_dim))


class SmallFlowHead(FlowMatchingHead):
    """v = MLP([x_t, t, glimpse])."""

    def __init__(self, config: SmallFlowConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]) -> None:
        super().__init__(config, backbone, proprio, shape)
        size, hidden = math.prod(shape), config.hidden
        self.network = nn.Sequential(nn.Linear(size + 1 + hidden, hidden), nn.GELU(), nn.Linear(hidden, size))

    def conditions(self, features: Features) -> Conditions:
        nothing = features.cognition.new_zeros(len(features.cognition), 1, 1, 0, dtype=torch.bool)
        return Conditions(self.glimpse(features), [], nothing)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        v: torch.Tensor = self.network(torch.cat([x.flatten(1), t[:, None], conditions.vector], -1))
        return v.view_as(x).float()
