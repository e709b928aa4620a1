"""One training step: penalty, loss with the carried memory, backward, clip, optimizer, memory detached.

`TrainingState` is everything that a step changes: what a checkpoint holds, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from ipvla.data.plan import PlanPosition
from ipvla.models.vla import IPVLA
from ipvla.policy import whole
from ipvla.training.parallel import unsynchronised
from ipvla.training.protection import Protection
from ipvla.types import Memory, StepBatch


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with linear warm-up and cosine decay.

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
        scaler: of the loss; one that is not enabled changes nothing.
    """

    model: IPVLA
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    memory: Memory
    step: int = 0
    position: PlanPosition = field(default_factory=PlanPosition)
    protection: Protection | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))


def training_step(
    state: TrainingState,
    windows: Sequence[StepBatch],
    lr: float,
    max_grad_norm: float,
    autocast: torch.dtype | None,
) -> dict[str, float]:
    """Trains on the mean loss of consecutive windows, one after another, the memory carried between them.

    Returns that mean, parts of it that the model names, the gradient's norm before clipping and any penalty; where
    the loss is scaled also `loss_scale`, and `skipped`: 1 if gradients overflowed and the weights stayed.

    Raises:
        FloatingPointError: loss or penalty are not finite, or the gradient of a loss that is not scaled up; the
            weights are as they were before the step.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    # First, so that DistributedDataParallel averages its gradient too, as one that was accumulated.
    penalty = _penalise(state)
    value, memory = 0.0, state.memory
    terms: dict[str, list[float]] = {}
    for number, window in enumerate(windows, 1):
        with unsynchronised(state.trained) if number < len(windows) else nullcontext():
            loss, memory = _accumulate(state, window, memory, len(windows), autocast)
        value += loss / len(windows)
        for name, term in state.model.terms.items():
            terms.setdefault(name, []).append(float(term))
    trainable = [p for p in state.model.parameters() if p.requires_grad]
    state.scaler.unscale_(state.optimizer)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)))
    finite = math.isfinite(norm)
    if not finite and state.scaler.get_scale() <= 1:  # 1 of a scaler that is not enabled
        raise FloatingPointError(
            f"the gradient's norm is {norm} at step {state.step}; "
            "lower optimizer.lr or set training.precision to fp32"
        )
    with state.protection.around() if state.protection and finite else nullcontext():
        state.scaler.step(state.optimizer)
    state.scaler.update()
    state.memory = memory
    means = {name: sum(values) / len(values) for name, values in terms.items()}
    if state.scaler.is_enabled():
        means |= {"loss_scale": state.scaler.get_scale(), "skipped": float(not finite)}
    return {"loss": value, **({"grad_norm": norm} if finite else {}), **penalty, **means}


def _accumulate(
    state: TrainingState, window: StepBatch, memory: Memory, windows: int, autocast: torch.dtype | None
) -> tuple[float, Memory]:
    """Leaves the gradient of this window's share of the mean; its loss, and the memory after it, detached."""
    window = window.to(state.model.action_varies.device)
    with torch.autocast(window.t.device.type, dtype=autocast, enabled=autocast is not None):
        loss, memory = state.trained(window, memory)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss is {value} at step {state.step}; lower optimizer.lr or set training.precision to fp32"
        )
    torch.autograd.backward(state.scaler.scale(loss / windows))
    return value, {name: tensor.detach() for name, tensor in memory.items()}


def _penalise(state: TrainingState) -> dict[str, float]:
    """Leaves the gradient of the penalty, if there is one; the penalty as a metric."""
    penalty = state.protection.penalty(state.step) if state.protection else None
    if penalty is None:
        return {}
    value = float(penalty.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the penalty of forgetting.method is {value} at step {state.step}; lower its strength or optimizer.lr"
        )
    torch.autograd.backward(state.scaler.scale(penalty))
    return {"penalty": value}
