"""Random subspaces, and residual layers small enough to see what a gradient does in them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipvla.forgetting.subspaces import LayerGroup, LayerSubspace, Subspaces

WIDTH = 12


def subspace(layer: int = 0, fragile: int = 3, plastic: int = 2, width: int = WIDTH) -> LayerSubspace:
    random = torch.Generator().manual_seed(layer)
    basis = torch.linalg.qr(torch.randn(width, fragile + plastic, generator=random, dtype=torch.float64))[
        0
    ].float()
    zeros = torch.zeros(width, width, dtype=torch.float64)
    return LayerSubspace(
        layer, basis[:, :fragile], basis[:, fragile:], zeros[0], zeros, zeros[0, : basis.shape[1]]
    )


def subspaces(groups: Sequence[Sequence[int]] = ((2, 3), (4, 5)), width: int = WIDTH) -> Subspaces:
    made = tuple(LayerGroup("ab"[i], tuple(layers), layers[-1]) for i, layers in enumerate(groups))
    return Subspaces(made, {g.representative: subspace(g.representative, width=width) for g in made}, {})


class Layer(nn.Module):
    """x + o_proj(x), then x + down_proj(tanh(x)); as a tuple where `extra`."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.o_proj, self.down_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str]:
        x = x + self.o_proj(x)
        y: Tensor = x + self.down_proj(x.tanh())
        return (y, "and more") if self.extra else y


class Stack(nn.Module):
    """Six layers, one after another."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(extra) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


def tokens(seed: int = 0, batch: int = 2) -> Tensor:
    """[batch, 5, WIDTH]"""
    return torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in radians between the spans of orthonormal a [D, r] and b [D, s]: float64 [min(r, s)], ascending.

    Small angles come from the sine, where the cosine is blind (Bjorck and Golub, 1973).
    """
    a, b = (a.double(), b.double()) if a.shape[1] >= b.shape[1] else (b.double(), a.double())
    cosine = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sine = torch.linalg.svdvals(b - a @ (a.T @ b)).flip(0).clamp(max=1)
    return torch.where(cosine**2 > 0.5, sine.asin(), cosine.acos())
