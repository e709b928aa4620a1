"""What training has added to a weight, dW, and its size; no more of dW is formed than the size needs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class WeightChange(ABC):
    """dW of one weight, in the graph of what is trained.

    Attributes:
        shape: of dW, with a kernel's extents flattened into the last dimension of a `LowRankChange`.
        device: that of the weight.
    """

    shape: torch.Size
    device: torch.device

    @abstractmethod
    def square(self) -> Tensor:
        """||dW||_F^2, a scalar, at least float32."""

    @abstractmethod
    def weighted_square(self, weight: Tensor) -> Tensor:
        """The sum of weight * dW^2 for a weight of `shape`, a scalar, at least float32."""


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

    def square(self) -> Tensor:
        a, b = self._factors()
        return self._scale**2 * ((b.T @ b) * (a @ a.T)).sum()  # ||BA||^2 = tr(B'B AA'), r x r

    def weighted_square(self, weight: Tensor) -> Tensor:
        a, b = self._factors()
        return (weight * (self._scale * (b @ a)).square()).sum()

    def _factors(self) -> tuple[Tensor, Tensor]:
        return _precise(self._a).flatten(1), _precise(self._b).flatten(1)


class FullChange(WeightChange):
    """dW = theta - theta_0, of a weight that is trained itself; theta_0 is what it is now, a copy."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._start = weight, weight.detach().clone()
        self.shape, self.device = weight.shape, weight.device

    def square(self) -> Tensor:
        return self._moved().square().sum()

    def weighted_square(self, weight: Tensor) -> Tensor:
        return (weight * self._moved().square()).sum()

    def _moved(self) -> Tensor:
        return _precise(self._weight) - _precise(self._start)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
