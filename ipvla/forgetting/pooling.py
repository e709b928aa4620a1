"""From hidden states to one vector per record: the mean over the instruction's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pooled:
    """One vector per record.

    Attributes:
        vectors: float64 [B, D], zero rows where the mask is empty.
        empty: bool [B], True where no position was masked in.
    """

    vectors: Tensor
    empty: Tensor


def instruction_mean(hidden: Tensor, mask: Tensor) -> Pooled:
    """Mean of hidden [B, N, D] over the positions where mask bool [B, N] is True; the others are never read.

    Raises:
        ValueError: the shapes do not fit, or the mask is not bool.
    """
    if mask.dtype != torch.bool or hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        raise ValueError(
            f"hidden states {list(hidden.shape)} and mask {mask.dtype} {list(mask.shape)} do not fit; "
            "give [B, N, D] and bool [B, N]"
        )
    count = mask.sum(1)
    total = hidden.double().masked_fill(~mask[..., None], 0).sum(1)
    return Pooled(total / count.clamp(min=1)[:, None], count == 0)
