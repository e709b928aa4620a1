"""One training step: loss with the carried memory, backward, clip, optimizer, memory detached."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from ipvla.training.state import TrainingState
from ipvla.types import StepBatch


def training_step(
    state: TrainingState, batch: StepBatch, lr: float, max_grad_norm: float, autocast: bool
) -> dict[str, float]:
    """Trains on one window; returns the loss and the gradient's norm before clipping.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the weights are as they were before the step.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
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
    return {"loss": value, "grad_norm": norm}
