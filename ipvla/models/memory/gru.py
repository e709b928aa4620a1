"""A recurrent hidden state, as in RoboFlamingo (arXiv 2311.01378): h' = GRU(z, h), z' = z + W [h'].

z [B, D] is the cognition; h [B, H] is the memory, zero at an episode's start (Cho et al., arXiv 1406.1078). The
update gate's bias is drawn by chrono initialisation (Tallec and Ollivier, arXiv 1804.11188).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule
from ipvla.types import Memory


@MemoryConfig.register_subclass("gru")
@dataclass(frozen=True)
class GRUMemoryConfig(MemoryConfig):
    """hidden: size of the hidden state h."""

    hidden: int = 128

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"memory.hidden is {self.hidden}; it must be at least 1")

    def build(self, width: int) -> GRUMemory:
        return GRUMemory(width, self.hidden)


class GRUMemory(MemoryModule):
    """See the module's docstring."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cell = nn.GRUCell(width, hidden)
        self.out = nn.Linear(hidden, width)
        with torch.no_grad():  # units that hold for 1 to 40 policy steps from the start (chrono initialisation)
            self.cell.bias_hh[hidden : 2 * hidden] = 0
            self.cell.bias_ih[hidden : 2 * hidden] = torch.empty(hidden).uniform_(1, 39).log()

    def initial(self, batch: int) -> Memory:
        return {"hidden": self.cell.bias_hh.new_zeros(batch, self.cell.hidden_size, dtype=torch.float32)}

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        with torch.autocast(memory["hidden"].device.type, enabled=False):  # what is remembered stays float32
            hidden = self.cell(self.norm(features.cognition.float()), memory["hidden"])
        return features.with_cognition(features.cognition + self.out(hidden)), {"hidden": hidden}
