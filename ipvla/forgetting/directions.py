"""Directions of a layer's width, and what share of anything that lies along each of them is taken away.

Rows x [..., D] lose x U diag(w) U', so x - removed(x) keeps the share 1 - w_k along direction u_k and everything
across U. In this residual form nothing at all changes, bit for bit, where w is 0; the sum of the remaining parts
would not add up to x again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ipvla.forgetting.method import Gains
from ipvla.forgetting.subspaces import LayerSubspace


class Directions(nn.Module):
    """Orthonormal columns U and their weights w; buffers, so that w can change without a new graph.

    Attributes:
        basis: U float32 [D, r].
        weight: w float32 [r], 0 at first.
    """

    basis: Tensor
    weight: Tensor

    def __init__(self, basis: Tensor, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("basis", basis.to(device, torch.float32), persistent=False)
        self.register_buffer("weight", torch.zeros(basis.shape[1], device=device), persistent=False)

    def removed(self, x: Tensor) -> Tensor:
        """x [..., D] -> x U diag(w) U' [..., D], at least float32."""
        x = x.to(torch.promote_types(x.dtype, self.basis.dtype))
        basis = self.basis.to(x.dtype)
        return (x @ basis * self.weight) @ basis.T


class GainedSubspace(Directions):
    """U = [Uf Up] of a layer, w = [1 - gamma, 1 - beta]: gamma is the gain along Uf, beta that along Up."""

    def __init__(self, subspace: LayerSubspace, device: torch.device) -> None:
        super().__init__(subspace.basis, device)
        self.fragile = subspace.fragile.shape[1]

    def set_gains(self, gains: Gains) -> None:
        self.weight[: self.fragile] = 1 - gains.gamma
        self.weight[self.fragile :] = 1 - gains.beta


class DampedSpectrum(Directions):
    """x -> x (I + lambda M)^-1 for a second moment M, as x - removed(x) with w = lambda s / (1 + lambda s).

    U and s are M's eigenvectors and eigenvalues, decomposed once in float64, so that a new lambda costs nothing.

    Args:
        moment: M [n, n], symmetric and positive semi-definite.
        name: of M, for the errors.
        width: n, which the adapter needs.

    Raises:
        ValueError: M is of another size, not finite, not symmetric, or clearly indefinite.
    """

    spectrum: Tensor

    def __init__(self, moment: Tensor, name: str, width: int, device: torch.device) -> None:
        if moment.shape != (width, width):
            raise ValueError(
                f"{name} is {list(moment.shape)}, the adapter needs [{width}, {width}]; "
                "collect the module statistics of this model"
            )
        moment = moment.to(device, torch.float64)
        if not torch.isfinite(moment).all() or not torch.allclose(moment, moment.T):
            raise ValueError(f"{name} is not a finite symmetric matrix; collect the module statistics again")
        spectrum, vectors = torch.linalg.eigh(moment)
        if spectrum[0] < -1e-6 * max(1.0, float(spectrum[-1])):
            raise ValueError(
                f"{name} has the eigenvalue {float(spectrum[0]):.3g}; a second moment has none below 0: "
                "collect the module statistics again"
            )
        super().__init__(vectors, device)
        self.register_buffer("spectrum", spectrum.clamp(min=0).float(), persistent=False)

    def set_gains(self, gains: Gains) -> None:
        scaled = gains.lam * self.spectrum
        self.weight.copy_(scaled / (1 + scaled))
