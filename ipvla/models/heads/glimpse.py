"""A glimpse: what the (memory-augmented) cognition asks for is looked up among the visual tokens."""

from __future__ import annotations

import torch
from torch import nn

from ipvla.models.features import Features


class Glimpse(nn.Module):
    """Features -> one vector [B, H] that holds cognition, what was looked at, and the proprioception.

    Single-head cross-attention per query: softmax(W_q c . W_k v / sqrt(k)) v over the visual tokens, whose
    raw values (coordinates included) are read out, so a query can return a place.
    """

    def __init__(
        self, width: int, perception: int, proprio: int, hidden: int, queries: int, key: int = 64
    ) -> None:
        super().__init__()
        self.queries = queries
        self.key_size = key
        self.ask = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())
        self.query = nn.Linear(hidden, queries * key)
        self.key = nn.Linear(perception, key)
        with torch.no_grad():
            self.key.weight *= 4  # sharp enough from the start to pick single cells
        self.out = nn.Sequential(nn.Linear(queries * perception + hidden + proprio, hidden), nn.GELU())

    def forward(self, features: Features) -> torch.Tensor:
        asked = self.ask(features.cognition)
        query = self.query(asked).unflatten(-1, (self.queries, self.key_size))
        score = query @ self.key(features.perception).transpose(1, 2) * self.key_size**-0.5
        glimpsed = score.float().softmax(-1).to(features.perception.dtype) @ features.perception
        out: torch.Tensor = self.out(torch.cat([glimpsed.flatten(1), asked, features.proprio.to(asked.dtype)], -1))
        return out
