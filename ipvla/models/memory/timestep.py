"""Sinusoidal timestep encoding (Vaswani et al., arXiv 1706.03762) of control steps."""

from __future__ import annotations

import torch
from torch import nn


class TimestepEncoding(nn.Module):
    """t [...] in control steps -> float32 [..., width]: sines, then cosines, of t / 10000^(2i / width)."""

    frequency: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        half = torch.arange((width + 1) // 2)
        self.register_buffer("frequency", 10000.0 ** (-2 * half / width), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angle = t[..., None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], -1)[..., : self.width]
