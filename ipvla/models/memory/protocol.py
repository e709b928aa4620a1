"""The memory protocol: a value goes in with the features, another comes out with enriched features."""

from __future__ import annotations

from dataclasses import dataclass

import draccus
import torch
from torch import nn

from ipvla.models.features import Features
from ipvla.types import Memory


def select(condition: torch.Tensor, yes: Memory, no: Memory) -> Memory:
    """Row by row: `yes` where `condition` bool [B] is True, else `no`."""
    return {
        name: torch.where(condition.reshape(-1, *[1] * (value.ndim - 1)), value, no[name])
        for name, value in yes.items()
    }


@dataclass(frozen=True)
class MemoryConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the mechanisms of this folder."""

    def build(self, width: int) -> MemoryModule:
        """The mechanism for cognition of size `width`."""
        raise NotImplementedError


class MemoryModule(nn.Module):
    """One information-preserving mechanism. Its weights are learned; what it remembers is never an attribute."""

    def initial(self, batch: int) -> Memory:
        """The memory of an episode that has not begun: named tensors [batch, ...] of a fixed size."""
        raise NotImplementedError

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        """One policy step of features [B, ...] at control step t int64 [B]: (enriched features, next memory)."""
        raise NotImplementedError

    def scan(
        self, features: Features, memory: Memory, t: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor
    ) -> tuple[Features, Memory]:
        """A training window [B, K, ...], step by step: reset where `is_first`, unchanged where not `valid`."""
        fresh = self.initial(is_first.shape[0])
        fresh = {name: value.to(t.device) for name, value in fresh.items()}
        steps: list[Features] = []
        for k in range(is_first.shape[1]):
            now = features.at(k)
            enriched, after = self.step(now, select(is_first[:, k], fresh, memory), t[:, k])
            memory = select(valid[:, k], after, memory)
            steps.append(enriched)
        return self._stack(features, steps), memory

    def _stack(self, features: Features, steps: list[Features]) -> Features:
        return features.with_cognition(torch.stack([s.cognition for s in steps], 1))
