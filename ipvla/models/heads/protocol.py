"""The Head protocol: from memory-augmented features to a chunk of actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import draccus
import torch
from torch import nn

from ipvla.models.features import Features


class Head(nn.Module):
    """`weight` bool [B, C, A] is True where an action exists and its dimension varies in the dataset."""

    def loss(self, features: Features, actions: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Scalar loss of normalised actions [B, C, A], averaged over `weight`."""
        raise NotImplementedError

    def sample(self, features: Features) -> torch.Tensor:
        """Normalised actions float32 [B, C, A]."""
        raise NotImplementedError


@dataclass(frozen=True)
class HeadConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the heads of this folder.

    Attributes:
        bounded: what it gives lies in [-1, 1], whatever is normal.
    """

    bounded: ClassVar[bool] = False

    def build(self, width: int, perception: int, proprio: int, chunk: int, action_dim: int) -> Head:
        """A head for cognition of size `width`, visual tokens of size `perception` and `proprio` dimensions."""
        raise NotImplementedError


def masked_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `weight` is True; 0 where nothing is, so that an idle window has no gradient."""
    return (values * weight).sum() / weight.sum().clamp(min=1)
