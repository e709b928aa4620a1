"""Many visual tokens squeezed into a few that a memory can afford to keep."""

from __future__ import annotations

import torch
from torch import nn


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
