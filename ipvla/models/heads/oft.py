"""OpenVLA-OFT's head (arXiv 2502.19645): a residual MLP from the states of a chunk's places to its actions, by L1.

What a memory has added to the cognition is added to the state of every place: nothing while its gate is closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.backbones.prismatic import PrismaticBackbone
from ipvla.models.features import Features, Reads
from ipvla.models.heads.openvla_tokens import states_of
from ipvla.models.heads.protocol import Head, HeadConfig, masked_mean


@HeadConfig.register_subclass("oft")
@dataclass(frozen=True)
class OFTConfig(HeadConfig):
    """Needs `model.backbone.type prismatic` with `action_places`; blocks: of the MLP."""

    blocks: int = 2

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"head.blocks is {self.blocks}; give 0 or more")

    @property
    def reads(self) -> Reads:
        return Reads(hidden=(-1,))

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> OFTHead:
        places = backbone.config.action_places if isinstance(backbone, PrismaticBackbone) else 0
        if places != chunk * action_dim:
            raise ValueError(
                f"model.head.type oft reads a place for each of {chunk} x {action_dim} numbers; set "
                f"model.backbone.type prismatic and model.backbone.action_places {chunk * action_dim}"
            )
        return OFTHead(self, backbone.width, (chunk, action_dim))


class OFTHead(Head):
    """See the module's docstring. Names inside `model` are the published ones."""

    def __init__(self, config: OFTConfig, width: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.model = _ResidualMLP(config.blocks, shape[1] * width, width, shape[1])

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        chunk, size = self.shape
        states, recalled = states_of(features, chunk * size + 1, chunk * size)
        actions: torch.Tensor = self.model((states + recalled).reshape(len(states), chunk, -1)).float()
        return actions

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        return masked_mean((self.sample(features) - actions).abs(), weight)


class _ResidualMLP(nn.Module):
    def __init__(self, blocks: int, inside: int, width: int, out: int) -> None:
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(inside), nn.Linear(inside, width)
        self.mlp_resnet_blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(blocks))
        self.layer_norm2, self.fc2 = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(self.layer_norm1(x)).relu()
        for block in self.mlp_resnet_blocks:
            x = block(x)
        out: torch.Tensor = self.fc2(self.layer_norm2(x))
        return out


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.ffn(x).relu()
        return out
