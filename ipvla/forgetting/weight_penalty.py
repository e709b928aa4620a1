"""Penalties that hold weights near the teacher's: the loss gains a term that is quadratic in what training added.

    L2-SP  weight / 2 * sum dW^2       Li, Grandvalet and Davoine, arXiv 1802.01483
    EWC    weight / 2 * sum F dW^2     Kirkpatrick et al., arXiv 1612.00796, eq. 3

with F the diagonal of the teacher's Fisher information (`fisher`), scaled to mean 1 over all protected weights. So
EWC with a flat F is L2-SP, and one weight means as much for either. The settings call this weight `strength`,
since the recipes of recorded comparisons do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ipvla.forgetting.fisher import DiagonalFisher
from ipvla.forgetting.method import Method, MethodConfig, Target


class WeightChange(ABC):
    """dW of one weight, in the graph of what is trained.

    Attributes:
        shape: of dW, with a kernel's extents flattened into the last dimension of a `LowRankChange`.
        device: that of the weight.
    """

    shape: torch.Size
    device: torch.device

    @abstractmethod
    def square(self, importance: Tensor | None = None) -> Tensor:
        """The sum of dW^2, each times its `importance` of `shape` if that is given: a scalar, at least float32."""


class LowRankChange(WeightChange):
    """dW = scale B A, of a LoRA adapter that began with dW = 0 (Hu et al., arXiv 2106.09685).

    Args:
        a: A [r, in, ...], of a convolution with its kernel's extents.
        b: B [out, r], of a convolution [out, r, 1, ...].
        scale: alpha / r.

    Raises:
        ValueError: B is not 0, so that dW would not be what training adds.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        if b.detach().count_nonzero():
            raise ValueError("B of an adapter is not 0 before training; start from a policy without adapters")
        self._a, self._b, self._scale = a, b, scale
        self.shape, self.device = torch.Size((b.shape[0], a[0].numel())), b.device

    def square(self, importance: Tensor | None = None) -> Tensor:
        a, b = _precise(self._a).flatten(1), _precise(self._b).flatten(1)
        if importance is None:
            return self._scale**2 * ((b.T @ b) * (a @ a.T)).sum()  # ||BA||^2 = tr(B'B AA'), r x r
        return (importance * (self._scale * (b @ a)).square()).sum()


class FullChange(WeightChange):
    """dW = theta - theta_0, of a weight that is trained itself; theta_0 is what it is now, a copy."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._start = weight, weight.detach().clone()
        self.shape, self.device = weight.shape, weight.device

    def square(self, importance: Tensor | None = None) -> Tensor:
        squares = (_precise(self._weight) - _precise(self._start)).square()
        return (squares if importance is None else importance * squares).sum()


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class WeightPenaltyConfig(MethodConfig):
    """strength: weight of the penalty, with EWC's F normalised; >= 0, and 0 leaves training alone."""

    strength: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < math.inf:
            kind = self.get_choice_name(type(self))
            raise ValueError(f"the strength of {kind} is {self.strength}; it must be finite and at least 0")


@MethodConfig.register_subclass("l2_sp")
@dataclass(frozen=True)
class L2SPConfig(WeightPenaltyConfig):
    """On the adapters, or without any on all that is trained. Needs no artifact."""

    def build(self, changes: Mapping[str, WeightChange]) -> WeightPenalty:
        """`changes`: of the weights that are held, by name."""
        return WeightPenalty(changes, self.strength)

    def install(self, target: Target) -> Method:
        return self.build(target.changes()) if self.strength else Method()


@MethodConfig.register_subclass("ewc")
@dataclass(frozen=True)
class EWCConfig(WeightPenaltyConfig):
    """On the adapters, or without any on all that the teacher has.

    A memory of another mechanism than the teacher's is left free: there is nothing in it to forget.
    """

    def build(self, changes: Mapping[str, WeightChange], fisher: Mapping[str, Tensor]) -> WeightPenalty:
        """`fisher`: of each weight of `changes`, by its name, of the weight's size."""
        return WeightPenalty(changes, self.strength, fisher)

    def install(self, target: Target) -> Method:
        if not self.strength:
            return Method()
        fisher = target.measured(DiagonalFisher).weights
        return self.build(target.changes({name: f.shape for name, f in fisher.items()}), fisher)


class WeightPenalty(Method):
    """weight / 2 * sum F dW^2 over all weights; F is 1 where none is given.

    Args:
        changes: by the weight's name, at least one.
        importance: F >= 0, by the weight's name; stored as float32 on the weight's device.

    Raises:
        ValueError: no weight, a weight without F, an F of another size, or F all 0, negative or not finite.
    """

    def __init__(
        self, changes: Mapping[str, WeightChange], weight: float, importance: Mapping[str, Tensor] | None = None
    ) -> None:
        if not changes:
            raise ValueError("there is no weight to hold near the teacher's; train adapters or the whole model")
        self._changes = dict(changes)
        self._weight = weight
        self._importance = {} if importance is None else _normalised(importance, changes)

    def penalty(self, step: int) -> Tensor:
        """A scalar, at least float32, in the graph of the weights; the same function of these at every step."""
        terms = [change.square(self._importance.get(name)) for name, change in self._changes.items()]
        return 0.5 * self._weight * torch.stack(terms).sum()


def _normalised(importance: Mapping[str, Tensor], changes: Mapping[str, WeightChange]) -> dict[str, Tensor]:
    """What of `importance` belongs to `changes`, in their shapes, with mean 1 over all its entries."""
    if missing := [name for name in changes if name not in importance]:
        raise ValueError(
            f"the artifact has no Fisher information of {missing[0]} ({len(missing)} weights lack it); "
            "make it again with --adapters as model.lora, or with --fisher.weights all"
        )
    for name, change in changes.items():
        if importance[name].numel() != change.shape.numel() or len(importance[name]) != change.shape[0]:
            raise ValueError(
                f"the Fisher information of {name} is {list(importance[name].shape)}, the weight is "
                f"{list(change.shape)}; measure it on the policy that this run starts from"
            )
    total = sum(importance[name].double().sum().item() for name in changes)
    if not 0 < total < math.inf or any(importance[name].min() < 0 for name in changes):
        raise ValueError(
            f"the Fisher information sums to {total}; it must be positive and finite: measure it again"
        )
    scale = sum(change.shape.numel() for change in changes.values()) / total
    return {
        name: (importance[name].to(change.device, torch.float32) * scale).reshape(change.shape)
        for name, change in changes.items()
    }
