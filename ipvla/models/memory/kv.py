"""Cached keys and values of earlier steps, first in, first out: memory without a single weight.

The memory stores the language layers' keys and values of the prompt's last n tokens, for each of the last L policy
steps; every token of later steps attends to them as to its own. The idea is TempoFit's (arXiv 2603.07647): it
needs no training, so it can be tried on a frozen model; where the model is trained, gradients flow into the cached
entries. Attention has no other clock than a bias on the scores, -s_h * gap, with the gap in seconds and one slope
s_h per head (ALiBi, Press et al., arXiv 2108.12409).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ipvla.models.backbones import Backbone, BackboneOutput, Context, KeysValues
from ipvla.models.memory.protocol import BackboneMemory, MemoryConfig
from ipvla.types import Memory

_STEPS_PER_S = 20.0


@MemoryConfig.register_subclass("kv")
@dataclass(frozen=True)
class KVMemoryConfig(MemoryConfig):
    """What is cached.

    Attributes:
        length: L, policy steps; older ones are forgotten.
        tokens: n, of each step the prompt's last tokens.
        recency: scales the slopes of the bias; 0 makes all steps alike.
    """

    length: int = 32
    tokens: int = 1
    recency: float = 1.0

    def __post_init__(self) -> None:
        for name in ("length", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; it must be at least 1")
        if self.recency < 0:
            raise ValueError(f"memory.recency is {self.recency}; it must be 0 or more")

    @property
    def feeds_backbone(self) -> bool:
        return True

    def build(self, backbone: Backbone) -> KVMemory:
        return KVMemory(self, backbone.num_layers, backbone.heads, backbone.cache_size)


class KVMemory(BackboneMemory):
    """See the module's docstring.

    State: `keys` and `values` float32 [B, layers, L * n, Dk], `t` int64 [B, L * n], -1 in empty places.
    """

    slopes: torch.Tensor

    def __init__(self, config: KVMemoryConfig, layers: int, heads: int, size: int) -> None:
        super().__init__()
        self.config = config
        self.shape = (layers, config.length * config.tokens, size)
        slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)])
        self.register_buffer("slopes", config.recency * slopes, persistent=False)

    def initial(self, batch: int) -> Memory:
        empty = self.slopes.new_zeros(batch, *self.shape)
        t = torch.full((batch, self.shape[1]), -1, device=self.slopes.device)
        return {"keys": empty, "values": empty, "t": t}

    def context(self, memory: Memory, t: torch.Tensor) -> Context:
        gap_s = (t[:, None] - memory["t"]) / _STEPS_PER_S
        bias = -self.slopes[:, None] * gap_s[:, None]
        bias = bias.masked_fill((memory["t"] < 0)[:, None], -math.inf)
        return Context(past=KeysValues(memory["keys"], memory["values"], bias), keep=self.config.tokens)

    def update(self, output: BackboneOutput, memory: Memory, t: torch.Tensor) -> Memory:
        assert output.last_keys_values is not None
        n = self.config.tokens
        keys, values = (
            torch.cat([memory[name][:, :, n:], new.float()], 2)
            for name, new in zip(("keys", "values"), output.last_keys_values, strict=True)
        )
        return {"keys": keys, "values": values, "t": torch.cat([memory["t"][:, n:], t[:, None].expand(-1, n)], 1)}
