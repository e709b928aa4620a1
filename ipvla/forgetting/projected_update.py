"""Projected update: what an optimizer's step has written along the fragile and plastic directions is scaled back.

    dB <- dB - (1 - gamma) Uf Uf' dB - (1 - beta) Up Up' dB

where dB is what the step did to an adapter's B, its weight decay included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ipvla.forgetting.adapter_update import WriterUpdate, writers
from ipvla.forgetting.method import Factors, Method, MethodConfig, Target
from ipvla.forgetting.subspaces import LayerSubspace


@MethodConfig.register_subclass("projected_update")
@dataclass(frozen=True)
class ProjectedUpdateConfig(MethodConfig):
    """On the adapters of modules that write into the residual stream, in the subspaces' layers.

    Attributes:
        beta, gamma: gains in [0, 1] of the update's parts along Up and along Uf; 1 leaves a part alone.
        writers: names of these modules inside a layer.
    """

    gained: ClassVar[tuple[str, ...]] = ("beta", "gamma")
    shards: ClassVar[bool] = True

    beta: float = 1.0
    gamma: float = 1.0
    writers: tuple[str, ...] = ("o_proj", "down_proj")

    def build(self, factors: Factors, subspaces: Mapping[str, LayerSubspace]) -> ProjectedUpdate:
        """`subspaces`: of each module of `factors`, by its name."""
        return ProjectedUpdate(factors, subspaces, self.gains)

    def install(self, target: Target) -> Method:
        return self.build(*writers(target, self.writers))


class ProjectedUpdate(WriterUpdate):
    """Scales the update's parts along Uf and Up. With gamma = 0, Uf' B never changes, whatever the optimizer."""

    _earlier: list[Tensor]

    @torch.no_grad()
    def before(self) -> None:
        self._earlier = [b.clone() for b in self._directions]

    @torch.no_grad()
    def after(self) -> None:
        for (b, directions), earlier in zip(self._directions.items(), self._earlier, strict=True):
            b.sub_(directions.removed((b - earlier).T).T)
        self._earlier = []
