"""Visual tokens in a memory: squeezed to a few, with a timestep encoding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryModule
from ipvla.types import Memory


class Squeeze(nn.Module):
    """x [..., N, Dp] -> W softmax(Q x' / sqrt(Dp)) x, float32 [..., n, d], with n learned queries Q [n, Dp].

    Attention pooling (Lee et al., arXiv 1810.00825) in place of MemoryVLA's convolutional squeeze: the tokens
    are read raw, so where coordinates are among their channels a query can keep a place.
    """

    def __init__(self, perception: int, tokens: int, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, perception))
        self.out = nn.Linear(perception, width)

    def forward(self, perception: torch.Tensor) -> torch.Tensor:
        with torch.autocast(perception.device.type, enabled=False):  # what is remembered stays float32
            x = perception.float()
            score = self.query * self.query.shape[1] ** -0.5 @ x.transpose(-1, -2)
            pooled: torch.Tensor = self.out(score.softmax(-1) @ x)
            return pooled


class SqueezingMemory(MemoryModule):
    """A mechanism that also remembers the perception, squeezed to n tokens; a training window's at once."""

    def __init__(self, perception: int, tokens: int, width: int) -> None:
        super().__init__()
        self.squeeze = Squeeze(perception, tokens, width) if tokens else None

    def remember(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        """`step` for features whose perception is squeezed already: float32 [B, n, d]."""
        raise NotImplementedError

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        enriched, memory = self.remember(self._squeezed(features), memory, t)
        return features.with_cognition(enriched.cognition), memory

    def scan(
        self, features: Features, memory: Memory, t: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor
    ) -> tuple[Features, Memory]:
        enriched, memory = self._loop(self.remember, self._squeezed(features), memory, t, is_first, valid)
        return features.with_cognition(enriched.cognition), memory

    def _squeezed(self, features: Features) -> Features:
        perception = features.perception
        squeezed = perception[..., :0, :].float() if self.squeeze is None else self.squeeze(perception)
        return replace(features, perception=squeezed)


class TimestepEncoding(nn.Module):
    """t [...] in control steps -> float32 [..., width]: sines, then cosines, of t / 10000^(2i / width).

    Vaswani et al., arXiv 1706.03762.
    """

    frequency: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        half = torch.arange((width + 1) // 2)
        self.register_buffer("frequency", 10000.0 ** (-2 * half / width), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angle = t[..., None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], -1)[..., : self.width]
