"""How a predicted chunk moves, against how the demonstration moved: terms that any head with a loss can add.

With D the difference between one action and the next, and a^ the predicted chunk:

    smoothness * mean (D^2 a^ - D^2 a)^2  +  jerk * mean (D^3 a^ - D^3 a)^2

Relative to the demonstration: a penalty on D^2 a^ alone would shrink every movement. Where actions are changes of
position, D^2 of actions is the jerk of the hand already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from ipvla.models.heads.protocol import masked_mean

#: Term -> order of its differences.
_ORDERS: Final = {"smoothness": 2, "jerk": 3}


@dataclass(frozen=True)
class QualityConfig:
    """Weights of the terms, each 0 for none.

    Attributes:
        smoothness: of second differences, at least 0.
        jerk: of third differences, at least 0.
        dimensions: of the actions that count, without a gripper that jumps, say; None for all.
    """

    smoothness: float = 0.0
    jerk: float = 0.0
    dimensions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in _ORDERS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"head.quality.{name} is {getattr(self, name)}; it must be finite and at least 0")

    def check(self, chunk: int, action_dim: int | None = None) -> None:
        """ValueError if chunks of this length, and size where it is known, lack such differences or dimensions."""
        for name, order in _ORDERS.items():
            if getattr(self, name) and chunk <= order:
                raise ValueError(f"head.quality.{name} needs a chunk of {order + 1}, and model.chunk is {chunk}")
        if action_dim is not None and (wrong := [d for d in self.dimensions or () if not 0 <= d < action_dim]):
            raise ValueError(f"head.quality.dimensions: {wrong} do not exist; choose among 0..{action_dim - 1}")

    def loss(
        self,
        predicted: torch.Tensor,
        actions: torch.Tensor,
        weight: torch.Tensor,
        share: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """Scalar, of chunks [B, C, A].

        Args:
            weight: bool [B, C, A]; a difference counts where all of its actions do.
            share: of each chunk in the sum, [B, 1, 1] or a number.
        """
        if self.dimensions is not None:
            chosen = list(self.dimensions)
            predicted, actions, weight = (x[..., chosen] for x in (predicted, actions, weight))
        error = predicted - actions
        total = error.new_zeros(())
        for name, order in _ORDERS.items():
            if factor := getattr(self, name):
                windows = weight.unfold(1, order + 1, 1).all(-1)
                total = total + factor * masked_mean(share * error.diff(order, 1).square(), windows)
        return total
