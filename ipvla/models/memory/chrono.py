"""Gates that hold from the start: chrono initialisation (Tallec and Ollivier, arXiv 1804.11188)."""

from __future__ import annotations

import math

import torch


def chrono_bias(size: int, horizon: int) -> torch.Tensor:
    """Biases float32 [size] of sigmoid gates that hold what they were told for T steps: log(T - 1).

    T - 1 is drawn log-uniformly from 1 to `horizon` - 1. The paper's uniform draw leaves so few fast units that a
    memory takes hardly anything in at first: on a cue shown for two steps, a GRU then needed twice the updates.
    """
    return torch.empty(size).uniform_(0, math.log(horizon - 1))
