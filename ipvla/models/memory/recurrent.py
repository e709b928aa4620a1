"""A recurrent hidden state, as in RoboFlamingo (arXiv 2311.01378): h' = cell(norm([z; p]), h), z' = z + W h'.

z [B, D] is the cognition and p [B, n * d] the squeezed perception (RoboFlamingo has z alone: `tokens: 0`);
h [B, H] is the memory, zero at an episode's start. `gru` is the cell of Cho et al. (arXiv 1406.1078),
`lstm` that of Hochreiter and Schmidhuber (1997), which also remembers its cell state c [B, H].
From the start, a unit holds its input for 2 to 40 policy steps (`chrono_bias`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, silence
from ipvla.models.memory.squeeze import SqueezingMemory
from ipvla.types import Memory

_HORIZON = 40


@dataclass(frozen=True)
class RecurrentMemoryConfig(MemoryConfig):
    """Sizes of a recurrent memory.

    Attributes:
        hidden: H, of the hidden state h, and of the LSTM's cell state c.
        tokens, token_width: n and d of the squeezed perception; no tokens, and only the cognition is remembered.
    """

    hidden: int = 96
    tokens: int = 4
    token_width: int = 32

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("tokens", 0), ("token_width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; it must be at least {least}")


@MemoryConfig.register_subclass("gru")
@dataclass(frozen=True)
class GRUMemoryConfig(RecurrentMemoryConfig):
    """See `RecurrentMemoryConfig`."""

    def build(self, backbone: Backbone) -> GRUMemory:
        return GRUMemory(self, backbone.width, backbone.perception_size)


@MemoryConfig.register_subclass("lstm")
@dataclass(frozen=True)
class LSTMMemoryConfig(RecurrentMemoryConfig):
    """See `RecurrentMemoryConfig`."""

    hidden: int = 80  # about as many parameters as the GRU's 96

    def build(self, backbone: Backbone) -> LSTMMemory:
        return LSTMMemory(self, backbone.width, backbone.perception_size)


class RecurrentMemory(SqueezingMemory):
    """What both cells share: what the model makes of an observation goes in, the hidden state is read out.

    Attributes:
        state: the memory's names; the first is the hidden state h.
    """

    state: tuple[str, ...]

    def __init__(
        self, config: RecurrentMemoryConfig, width: int, perception: int, cell: type[nn.GRUCell | nn.LSTMCell]
    ) -> None:
        super().__init__(perception, config.tokens, config.token_width)
        size = width + config.tokens * config.token_width
        self.norm = nn.LayerNorm(size)
        self.cell = cell(size, config.hidden)
        self.out = nn.Linear(config.hidden, width)

    def advance(self, inputs: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, ...]:
        """The next values of `state`, each float32 [B, H], from norm([z; p]) float32 [B, D + n * d]."""
        raise NotImplementedError

    def initial(self, batch: int) -> Memory:
        size, like = (batch, self.cell.hidden_size), self.cell.bias_hh
        return {name: like.new_zeros(size, dtype=torch.float32) for name in self.state}

    def close(self) -> bool:
        silence(self.out)
        return True

    def remember(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        with torch.autocast(t.device.type, enabled=False):  # what is remembered stays float32
            inputs = torch.cat([features.cognition.float(), features.perception.flatten(1)], -1)
            after = self.advance(self.norm(inputs), memory)
        cognition = features.cognition + self.out(after[0])
        return features.with_cognition(cognition), dict(zip(self.state, after, strict=True))


class GRUMemory(RecurrentMemory):
    """See the module's docstring."""

    state = ("hidden",)
    cell: nn.GRUCell

    def __init__(self, config: GRUMemoryConfig, width: int, perception: int) -> None:
        super().__init__(config, width, perception, nn.GRUCell)
        hidden = config.hidden
        with torch.no_grad():  # the update gate z, whose 1 - z lets new content in
            self.cell.bias_hh[hidden : 2 * hidden] = 0
            self.cell.bias_ih[hidden : 2 * hidden] = chrono_bias(hidden, _HORIZON)

    def advance(self, inputs: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, ...]:
        return (self.cell(inputs, memory["hidden"]),)


class LSTMMemory(RecurrentMemory):
    """See the module's docstring."""

    state = ("hidden", "cell")
    cell: nn.LSTMCell

    def __init__(self, config: LSTMMemoryConfig, width: int, perception: int) -> None:
        super().__init__(config, width, perception, nn.LSTMCell)
        hidden = config.hidden
        with torch.no_grad():  # rows: input, forget, cell and output gate; input bias = -forget bias
            self.cell.bias_hh[: 2 * hidden] = 0
            self.cell.bias_ih[hidden : 2 * hidden] = chrono_bias(hidden, _HORIZON)
            self.cell.bias_ih[:hidden] = -self.cell.bias_ih[hidden : 2 * hidden]

    def advance(self, inputs: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, ...]:
        hidden, cell = self.cell(inputs, (memory["hidden"], memory["cell"]))
        return hidden, cell


def chrono_bias(size: int, horizon: int) -> torch.Tensor:
    """Biases float32 [size] of sigmoid gates that hold their content for T steps from the start: log(T - 1).

    Chrono initialisation (Tallec and Ollivier, arXiv 1804.11188). T - 1 is drawn log-uniformly from 1 to
    `horizon` - 1. The paper's uniform draw leaves so few fast units that a memory takes hardly anything in at
    first: on a cue shown for two steps, a GRU then needed twice the updates.
    """
    return torch.empty(size).uniform_(0, math.log(horizon - 1))
