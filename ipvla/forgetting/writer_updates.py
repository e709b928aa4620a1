"""Methods that correct what an optimizer's step did to B [out, r] of LoRA factors A [r, in] and B.

What an adapter adds to its module's output is (alpha / r) B A x. So a part along Uf is only ever written by
columns of B, and an update of B that has nothing along Uf writes nothing there, whatever the optimizer did to the
gradient. At gains that change nothing, weights stay bit for bit what the optimizer made them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipvla.forgetting.directions import GainedSubspace
from ipvla.forgetting.method import Factors, Gains, Method, MethodConfig, Target, require_all
from ipvla.forgetting.subspaces import LayerSubspace


@dataclass(frozen=True)
class WriterUpdateConfig(MethodConfig):
    """On the adapters of modules that write into the residual stream, in the subspaces' layers.

    Attributes:
        beta, gamma: gains in [0, 1] of the parts along Up and along Uf; 1 leaves a part alone.
        writers: names of these modules inside a layer, e.g. `o_proj` and `down_proj`.
    """

    gained: ClassVar[tuple[str, ...]] = ("beta", "gamma")

    beta: float = 1.0
    gamma: float = 1.0
    writers: tuple[str, ...] = ("o_proj", "down_proj")


def writers(target: Target, names: Collection[str]) -> tuple[Factors, dict[str, LayerSubspace]]:
    """The adapters of the modules of these names in the subspaces' layers, and the subspace of each.

    Such modules must write into the residual stream, e.g. `o_proj` and `down_proj`.
    """
    protected = {layer for group in target.subspaces.groups for layer in group.layers}
    factors = target.factors(lambda name: name.rsplit(".", 1)[-1] in names and target.layer_of(name) in protected)
    layers = {name: target.layer_of(name) for name in factors}
    return factors, {name: target.subspaces.for_layer(n) for name, n in layers.items() if n is not None}


class WriterUpdate(Method):
    """One set of directions per B, all with the same gains.

    Raises:
        ValueError: a module has no subspace, or its output is not of the subspace's width.
    """

    def __init__(self, factors: Factors, subspaces: Mapping[str, LayerSubspace], gains: Gains) -> None:
        require_all(factors, subspaces, "subspace")
        for name, (_, b) in factors.items():
            width = subspaces[name].fragile.shape[0]
            if b.shape[0] != width:
                raise ValueError(
                    f"B of {name} has {b.shape[0]} rows, its subspace is of width {width}; "
                    "give only modules that write into the residual stream, such as o_proj and down_proj"
                )
        self._directions = {b: GainedSubspace(subspaces[name], b.device) for name, (_, b) in factors.items()}
        self.set_gains(gains)

    def set_gains(self, gains: Gains) -> None:
        gains.check()
        for directions in self._directions.values():
            directions.set_gains(gains)


@MethodConfig.register_subclass("projected_update")
@dataclass(frozen=True)
class ProjectedUpdateConfig(WriterUpdateConfig):
    """What a step wrote along fragile directions is scaled back; see `ProjectedUpdate`."""

    shards: ClassVar[bool] = True

    def build(self, factors: Factors, subspaces: Mapping[str, LayerSubspace]) -> ProjectedUpdate:
        """`subspaces`: of each module of `factors`, by its name."""
        return ProjectedUpdate(factors, subspaces, self.gains)

    def install(self, target: Target) -> Method:
        return self.build(*writers(target, self.writers))


class ProjectedUpdate(WriterUpdate):
    """What an optimizer's step has written along the fragile and plastic directions is scaled back.

        dB <- dB - (1 - gamma) Uf Uf' dB - (1 - beta) Up Up' dB

    where dB is what the step did to an adapter's B, its weight decay included. With gamma = 0, Uf' B never
    changes, whatever the optimizer.
    """

    _earlier: list[Tensor]

    @torch.no_grad()
    def before(self) -> None:
        self._earlier = [b.clone() for b in self._directions]

    @torch.no_grad()
    def after(self) -> None:
        for (b, directions), earlier in zip(self._directions.items(), self._earlier, strict=True):
            b.sub_(directions.removed((b - earlier).T).T)
        self._earlier = []


@MethodConfig.register_subclass("routed_moments")
@dataclass(frozen=True)
class RoutedMomentsConfig(WriterUpdateConfig):
    """Gains act on AdamW's first moment alone (arXiv 2604.22407); see `RoutedMoments`."""

    def build(
        self, factors: Factors, subspaces: Mapping[str, LayerSubspace], optimizer: torch.optim.AdamW
    ) -> RoutedMoments:
        """`subspaces`: of each module of `factors`, by its name; `optimizer`: the one that trains them."""
        return RoutedMoments(factors, subspaces, optimizer, self.gains)

    def install(self, target: Target) -> Method:
        return self.build(*writers(target, self.writers), target.optimizer)


class RoutedMoments(WriterUpdate):
    """Gains act on AdamW's first moment of an adapter's B, and not on its second (arXiv 2604.22407).

    A gradient cut before Adam shrinks the second moment too, which divides the cut out again. Here both moments
    see the raw gradient, and the step is sum_k gain_k P_k m / (sqrt(v) + eps) instead of m / (sqrt(v) + eps).
    Separate moments m_k of the gradient's parts along Uf, Up and the rest need no room of their own: a running
    mean is linear, so m_k = P_k m, also when the gains change on the way. The gains are those of `set_gains`; the
    paper's own adapt to the overlap of old and new gradients.

    The division is by element: with gamma = 0 the update still has a little along Uf, `ProjectedUpdate` has none.

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
