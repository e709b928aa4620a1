"""A memory from outside of the package: exponential means of the cognition, each with its own horizon."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory import MemoryConfig, MemoryModule
from ipvla.types import Memory


@MemoryConfig.register_subclass("mean")
@dataclass(frozen=True)
class MeanMemoryConfig(MemoryConfig):
    """horizons: policy steps that each mean looks back over, every one at least 1."""

    horizons: tuple[float, ...] = (2.0, 8.0, 32.0)

    def __post_init__(self) -> None:
        if not self.horizons or min(self.horizons) < 1:
            raise ValueError(f"memory.horizons is {self.horizons}; give at least one, each at least 1")

    def build(self, backbone: Backbone) -> MeanMemory:
        return MeanMemory(backbone.width, self.horizons)


class MeanMemory(MemoryModule):
    """mean_i' = mean_i + (z - mean_i) / horizon_i;  z' = z + W [mean']. State: `means` float32 [B, n, D]."""

    def __init__(self, width: int, horizons: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("rate", 1 / torch.tensor(horizons)[:, None])
        self.out = nn.Linear(len(horizons) * width, width)
        nn.init.zeros_(self.out.weight)

    def initial(self, batch: int) -> Memory:
        return {"means": self.rate.new_zeros(batch, len(self.rate), self.out.out_features)}

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        means = memory["means"] + (features.cognition.float()[:, None] - memory["means"]) * self.rate
        return features.with_cognition(features.cognition + self.out(means.flatten(1))), {"means": means}
