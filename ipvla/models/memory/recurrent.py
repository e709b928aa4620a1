"""A recurrent hidden state, as in RoboFlamingo (arXiv 2311.01378): h' = cell(norm(z), h), z' = z + W h'.

z [B, D] is the cognition; h [B, H] is the memory, zero at an episode's start. `gru` is the cell of Cho et al.
(arXiv 1406.1078), `lstm` that of Hochreiter and Schmidhuber (1997), which remembers its cell state c [B, H] too.
From the start, a unit holds what it was told for 2 to 40 policy steps (`chrono.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.chrono import chrono_bias
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule
from ipvla.types import Memory

_HORIZON = 40


@MemoryConfig.register_subclass("gru")
@dataclass(frozen=True)
class GRUMemoryConfig(MemoryConfig):
    """hidden: size of the hidden state h."""

    hidden: int = 128

    def __post_init__(self) -> None:
        _check_hidden(self.hidden)

    def build(self, backbone: Backbone) -> GRUMemory:
        return GRUMemory(backbone.width, self.hidden)


@MemoryConfig.register_subclass("lstm")
@dataclass(frozen=True)
class LSTMMemoryConfig(MemoryConfig):
    """hidden: size of the hidden state h and of the cell state c."""

    hidden: int = 108  # as many parameters as the GRU's 128

    def __post_init__(self) -> None:
        _check_hidden(self.hidden)

    def build(self, backbone: Backbone) -> LSTMMemory:
        return LSTMMemory(backbone.width, self.hidden)


def _check_hidden(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"memory.hidden is {hidden}; it must be at least 1")


class RecurrentMemory(MemoryModule):
    """What both cells share: the normalised cognition goes in, the hidden state is read out.

    Attributes:
        state: the memory's names; the first is the hidden state h.
    """

    state: tuple[str, ...]

    def __init__(self, width: int, cell: nn.GRUCell | nn.LSTMCell) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cell = cell
        self.out = nn.Linear(cell.hidden_size, width)

    def advance(self, z: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, ...]:
        """The next values of `state`, each float32 [B, H], from z float32 [B, D]."""
        raise NotImplementedError

    def initial(self, batch: int) -> Memory:
        size, like = (batch, self.cell.hidden_size), self.cell.bias_hh
        return {name: like.new_zeros(size, dtype=torch.float32) for name in self.state}

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        with torch.autocast(t.device.type, enabled=False):  # what is remembered stays float32
            after = self.advance(self.norm(features.cognition.float()), memory)
        cognition = features.cognition + self.out(after[0])
        return features.with_cognition(cognition), dict(zip(self.state, after, strict=True))


class GRUMemory(RecurrentMemory):
    """See the module's docstring."""

    state = ("hidden",)
    cell: nn.GRUCell

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, nn.GRUCell(width, hidden))
        with torch.no_grad():  # the update gate z, whose 1 - z lets new content in
            self.cell.bias_hh[hidden : 2 * hidden] = 0
            self.cell.bias_ih[hidden : 2 * hidden] = chrono_bias(hidden, _HORIZON)

    def advance(self, z: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, ...]:
        return (self.cell(z, memory["hidden"]),)


class LSTMMemory(RecurrentMemory):
    """See the module's docstring."""

    state = ("hidden", "cell")
    cell: nn.LSTMCell

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, nn.LSTMCell(width, hidden))
        with torch.no_grad():  # rows: input, forget, cell and output gate; input bias = -forget bias
            self.cell.bias_hh[: 2 * hidden] = 0
            self.cell.bias_ih[hidden : 2 * hidden] = chrono_bias(hidden, _HORIZON)
            self.cell.bias_ih[:hidden] = -self.cell.bias_ih[hidden : 2 * hidden]

    def advance(self, z: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, ...]:
        hidden, cell = self.cell(z, (memory["hidden"], memory["cell"]))
        return hidden, cell
