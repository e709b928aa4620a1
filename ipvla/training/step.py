"""One training step: penalty, loss with the carried memory, backward, clip, optimizer, memory detached."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from ipvla.training.state import TrainingState
from ipvla.types import StepBatch


def training_step(
    state: TrainingState, batch: StepBatch, lr: float, max_grad_norm: float, autocast: bool
) -> dict[str, float]:
    """Trains on one window; returns the loss, the gradient's norm before clipping and any penalty.

    Raises:
        FloatingPointError: loss, penalty or gradient are not finite; the weights are as they were before the step.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    # First, so that DistributedDataParallel averages its gradient too, as one that was accumulated.
    penalty = _penalise(state)
    with torch.autocast(batch.t.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss, memory = state.trained(batch, state.memory)
    value = float(loss.detach())
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {value} at step {state.step}; lower optimizer.lr or set training.precision to fp32"
        )
    loss.backward()
    trainable = [p for p in state.model.parameters() if p.requires_grad]
    norm = float(torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm} at step {state.step}; "
            "lower optimizer.lr or set training.precision to fp32"
        )
    with state.protection.around() if state.protection else nullcontext():
        state.optimizer.step()
    state.memory = {name: tensor.detach() for name, tensor in memory.items()}
    return {"loss": value, "grad_norm": norm, **penalty}


def _penalise(state: TrainingState) -> dict[str, float]:
    """Leaves the gradient of what is added to the loss, if anything is, and says how much that was."""
    penalty = state.protection.penalty(state.step) if state.protection else None
    if penalty is None:
        return {}
    value = float(penalty.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the penalty of forgetting.method is {value} at step {state.step}; lower its strength or optimizer.lr"
        )
    torch.autograd.backward(penalty)
    return {"penalty": value}
