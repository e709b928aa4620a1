"""What a backbone hands on, and what memory enriches before the head reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch


@dataclass
class Features:
    """One observation's features. In training windows every tensor has leading axes [B, K], else [B].

    The two kinds follow MemoryVLA (arXiv 2508.19236): what the model makes of the scene, and what it sees.

    Attributes:
        cognition: [B, D], the last hidden state of the prompt's last token.
        perception: [B, N, Dp], visual tokens before the language layers.
        proprio: [B, P], the normalised proprioception, for heads that need it exactly.
    """

    cognition: torch.Tensor
    perception: torch.Tensor
    proprio: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same record with `function` applied to each tensor."""
        return type(self)(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def at(self, k: int) -> Self:
        """The window's step `k`: [B, K, ...] -> [B, ...]."""
        return self.map(lambda x: x[:, k])

    def with_cognition(self, cognition: torch.Tensor) -> Self:
        return replace(self, cognition=cognition)
