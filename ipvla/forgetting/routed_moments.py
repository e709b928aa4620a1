"""Routed moments: gains act on AdamW's first moment of an adapter's B, and not on its second (arXiv 2604.22407).

A gradient cut before Adam shrinks the second moment too, which divides the cut out again. Here both moments see
the raw gradient, and the step is sum_k gain_k P_k m / (sqrt(v) + eps) instead of m / (sqrt(v) + eps). Separate
moments m_k of the gradient's parts along Uf, Up and the rest need no room of their own: a running mean is linear,
so m_k = P_k m, also when the gains change on the way. The gains are those of `set_gains`; the paper's own adapt to
the overlap of old and new gradients.

The division is by element: with gamma = 0 the update still has a little along Uf, `projected_update` has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipvla.forgetting.adapter_update import WriterUpdate, writers
from ipvla.forgetting.gains import Gains
from ipvla.forgetting.method import Factors, Method, MethodConfig, Target
from ipvla.forgetting.subspaces import LayerSubspace


@MethodConfig.register_subclass("routed_moments")
@dataclass(frozen=True)
class RoutedMomentsConfig(MethodConfig):
    """On the adapters of modules that write into the residual stream, in the subspaces' layers.

    Attributes:
        beta, gamma: gains in [0, 1] of the first moment's parts along Up and along Uf; 1 leaves a part alone.
        writers: names of these modules inside a layer.
    """

    gained: ClassVar[tuple[str, ...]] = ("beta", "gamma")

    beta: float = 1.0
    gamma: float = 1.0
    writers: tuple[str, ...] = ("o_proj", "down_proj")

    def build(
        self, factors: Factors, subspaces: Mapping[str, LayerSubspace], optimizer: torch.optim.AdamW
    ) -> RoutedMoments:
        """`subspaces`: of each module of `factors`, by its name; `optimizer`: the one that trains them."""
        return RoutedMoments(factors, subspaces, optimizer, self.gains)

    def install(self, target: Target) -> Method:
        return self.build(*writers(target, self.writers), target.optimizer)


class RoutedMoments(WriterUpdate):
    """See the module's docstring.

    Raises:
        ValueError: the optimizer is not plain AdamW, or does not train these factors; or as `WriterUpdate`.
    """

    _steps: list[Tensor | float]

    def __init__(
        self,
        factors: Factors,
        subspaces: Mapping[str, LayerSubspace],
        optimizer: torch.optim.AdamW,
        gains: Gains,
    ) -> None:
        super().__init__(factors, subspaces, gains)
        if not isinstance(optimizer, torch.optim.AdamW):
            raise ValueError(f"moments are routed inside AdamW; the optimizer is {type(optimizer).__name__}")
        if any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups):
            raise ValueError("moments are routed in plain AdamW only; set amsgrad and maximize to False")
        self._optimizer = optimizer
        trained = self._groups()
        untrained = [name for name, (_, b) in factors.items() if b not in trained]
        if untrained:
            raise ValueError(f"the optimizer does not train B of {untrained}; build it over all adapters first")

    @torch.no_grad()
    def before(self) -> None:
        state = self._optimizer.state
        self._steps = [state[b]["step"].clone() if b in state else 0.0 for b in self._directions]

    @torch.no_grad()
    def after(self) -> None:
        groups = self._groups()
        for (b, directions), steps in zip(self._directions.items(), self._steps, strict=True):
            if b not in self._optimizer.state:  # it never had a gradient
                continue
            group, state = groups[b], self._optimizer.state[b]
            step = state["step"].double()
            mean, square = (1 - decay**step for decay in group["betas"])
            moved = step - steps  # 0 where the step was skipped
            removed = directions.removed(state["exp_avg"].T).T
            size = (state["exp_avg_sq"] / square).sqrt() + group["eps"]
            b.add_(removed / size * (moved * group["lr"] / mean))
        self._steps = []

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        return {p: group for group in self._optimizer.param_groups for p in group["params"]}
