"""Latent tokens that the backbone reads and rewrites at every step: recurrent memory (RMT, arXiv 2207.06881).

M tokens m [M, D] are read by the observation's tokens and read these, so that the language layers return them as
o = LN(backbone(observation, m)). Where every token reads every other they stand behind the prompt; in a causal
model in front of the observation, to be read, and once more behind it, to be rewritten (`Backbone.attention`).
A gate preserves a share of each token, so that it can outlast many steps:

    m' = z * m + (1 - z) * tanh(W o),   z = sigmoid(U [o; m] + b)

with m learned at an episode's start and b such that units hold for 2 to `horizon` policy steps (`chrono_bias`).
Training goes back through the window's steps and, within each, through the language layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone, BackboneOutput, Context
from ipvla.models.memory.protocol import BackboneMemory, MemoryConfig
from ipvla.models.memory.recurrent import chrono_bias
from ipvla.types import Memory


@MemoryConfig.register_subclass("latent")
@dataclass(frozen=True)
class LatentMemoryConfig(MemoryConfig):
    """tokens: M, latent tokens; horizon: policy steps that the slowest of them holds for from the start."""

    tokens: int = 4
    horizon: int = 40

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"memory.tokens is {self.tokens}; it must be at least 1")
        if self.horizon < 2:
            raise ValueError(f"memory.horizon is {self.horizon}; it must be at least 2 policy steps")

    @property
    def feeds_backbone(self) -> bool:
        return True

    def build(self, backbone: Backbone) -> LatentMemory:
        return LatentMemory(backbone.width, self.tokens, self.horizon)


class LatentMemory(BackboneMemory):
    """See the module's docstring. State: `latent` float32 [B, M, D]."""

    def __init__(self, width: int, tokens: int, horizon: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(tokens, width) * 0.3)
        self.norm = nn.LayerNorm(width)
        self.candidate = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, width)
        with torch.no_grad():
            self.gate.bias.copy_(chrono_bias(width, horizon))

    def initial(self, batch: int) -> Memory:
        return {"latent": self.start.float().expand(batch, -1, -1)}

    def context(self, memory: Memory, t: torch.Tensor) -> Context:
        return Context(tokens=memory["latent"])

    def update(self, output: BackboneOutput, memory: Memory, t: torch.Tensor) -> Memory:
        assert output.context_tokens is not None
        latent = memory["latent"]
        with torch.autocast(latent.device.type, enabled=False):  # what is remembered stays float32
            read = self.norm(output.context_tokens.float())
            hold = torch.sigmoid(self.gate(torch.cat([read, latent], -1)))
            return {"latent": hold * latent + (1 - hold) * torch.tanh(self.candidate(read))}
