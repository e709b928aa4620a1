"""Everything that training changes: what a checkpoint holds, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ipvla.data.plan import PlanPosition
from ipvla.models.vla import IPVLA
from ipvla.training.protection import Protection
from ipvla.types import Memory


@dataclass
class TrainingState:
    """One worker's training.

    Attributes:
        model: the bare model; `trained` is the same, wrapped for several workers.
        optimizer: over the model's trainable parameters.
        memory: of this worker's lanes, [B, ...].
        step: optimizer steps taken.
        position: the window that comes next.
        protection: against forgetting, or None: then there is nothing of it anywhere.
    """

    model: IPVLA
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    memory: Memory
    step: int = 0
    position: PlanPosition = field(default_factory=PlanPosition)
    protection: Protection | None = None
