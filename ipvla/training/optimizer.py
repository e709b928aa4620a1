"""AdamW with a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), linear warm-up, cosine decay.

    Attributes:
        lr: peak learning rate, > 0.
        final_lr_share: the last step's share of `lr`, in [0, 1].
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled, on matrices only.
        max_grad_norm: gradients are clipped to this global norm, > 0.
    """

    lr: float = 1e-3
    final_lr_share: float = 0.02
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.max_grad_norm <= 0:
            raise ValueError(f"optimizer.lr {self.lr} and max_grad_norm {self.max_grad_norm} must be above 0")
        if not 0 <= self.final_lr_share <= 1:
            raise ValueError(f"optimizer.final_lr_share is {self.final_lr_share}; it must be in [0, 1]")

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """An optimizer over the trainable parameters, in the model's order."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            [
                {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
                {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=self.lr,
            fused=True,
        )

    def learning_rate(self, step: int, steps: int) -> float:
        """At step 0 <= step < steps."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return self.lr * min(warm, self.final_lr_share + (1 - self.final_lr_share) * cosine)
