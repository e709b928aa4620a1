"""No memory: every step is decided from the current observation alone, as in OpenVLA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule
from ipvla.types import Memory


@MemoryConfig.register_subclass("none")
@dataclass(frozen=True)
class NoMemoryConfig(MemoryConfig):
    """Has no settings."""

    def build(self, backbone: Backbone) -> NoMemory:
        return NoMemory()


class NoMemory(MemoryModule):
    """The empty value in, the empty value out; features pass through bit for bit."""

    def initial(self, batch: int) -> Memory:
        return {}

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        return features, memory

    def scan(
        self, features: Features, memory: Memory, t: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor
    ) -> tuple[Features, Memory]:
        return features, memory
