"""Surgery on activation gradients in the backward pass (HSW).

At a site, with U = [Uf Up] of its layer and the gradient g [..., D] of the loss in the site's output:

    g'  = g - ((g U) * w) U',  w = [1 - gamma, 1 - beta]      what lies along Uf counts gamma, along Up beta
    g'' = g' ||g|| / (||g'|| + epsilon) where ||g'|| > ||g||, else g' itself      the norm shrinks only

||.|| runs over the whole tensor of one backward call. For gains in [0, 1] the first line contracts already; the
second is for gains above 1. With beta = gamma = 1 every gradient stays as it is, bit for bit.

The cut sits *behind* the site's output, so the adapters inside the site see the cut gradient, and so does all
below; what is above never does. With gamma = 0 the gradient of what is added last inside the site has nothing
along Uf; what a layer adds earlier (its attention) also reaches the loss through the layer's own MLP, whose
Jacobian brings some of Uf back.

Several layers in a row compound: the residual stream's gradient is cut at each, so that a nominal gain acts below
them as its power. `sites` chooses:

    last4    behind every layer of the subspaces' groups: the method to the letter
    single   behind the last of these layers alone: every adapter is reached, each gain acts once
    writers  behind the modules that write into the residual stream in these layers: their adapters are covered,
             the stream itself is not cut
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ipvla.forgetting.directions import GainedSubspace
from ipvla.forgetting.method import Gains, Method, MethodConfig, Target
from ipvla.forgetting.probed import edit_output
from ipvla.forgetting.subspaces import LayerSubspace, Subspaces

SITES: Final = ("last4", "single", "writers")
_READINGS: Final = ("norm_before", "norm_after", "fragile_energy", "plastic_energy")


@MethodConfig.register_subclass("hsw")
@dataclass(frozen=True)
class HSWConfig(MethodConfig):
    """Where gradients are cut, and by how much at first.

    Attributes:
        beta, gamma: gains of what is plastic and of what is fragile, in [0, 2]; 1 leaves it alone.
        sites: "last4", "single" or "writers"; see the module's docstring.
        writers: names, inside a layer, of the modules that write into the residual stream.
        epsilon: in the norm rule, >= 0.
    """

    gained: ClassVar[tuple[str, ...]] = ("beta", "gamma")
    largest_gain: ClassVar[float] = 2.0
    shards: ClassVar[bool] = True

    beta: float = 1.0
    gamma: float = 1.0
    sites: str = "last4"
    writers: tuple[str, ...] = ("o_proj", "down_proj")
    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sites not in SITES:
            raise ValueError(f"hsw.sites is {self.sites!r}; choose one of {', '.join(SITES)}")
        if self.sites == "writers" and not self.writers:
            raise ValueError("hsw.writers is empty; name the modules that write into the residual stream")
        if not self.epsilon >= 0:
            raise ValueError(f"hsw.epsilon is {self.epsilon}; it must be at least 0")

    def build(self, layers: Sequence[nn.Module], subspaces: Subspaces) -> HSW:
        """Puts surgeries behind the sites among `layers`; each puts out [B, N, D], or a tuple that begins with it.

        Build after the adapters and on the device of training, before `torch.compile`.

        Raises:
            ValueError: the subspaces are of deeper layers than there are; a layer lacks a writer.
        """
        numbers = sorted(number for group in subspaces.groups for number in group.layers)
        if numbers[-1] >= len(layers):
            raise ValueError(
                f"the subspaces protect layer {numbers[-1]}, but the model has {len(layers)} language layers; "
                "fit them on this backbone"
            )
        if self.sites == "single":
            numbers = numbers[-1:]
        sites = {}
        for number in numbers:
            for path, module in _inside(layers[number], number, self).items():
                sites[f"layer{number}{path}"] = module, subspaces.for_layer(number)
        return HSW(sites, self)

    def install(self, target: Target) -> Method:
        return self.build(target.layers, target.subspaces)


class _Cut(torch.autograd.Function):
    """The identity of x; `operate` stands in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operate: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.operate = operate
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.operate(g), None


class GradientSurgery(GainedSubspace):
    """The identity of x [..., D] whose gradient is cut on its way back.

    A gradient whose norm is not finite passes untouched and is counted.

    Attributes:
        totals: float64 [6], since last set to 0: finite calls, sums over them of the norm before, the norm after
            and the shares in [0, 1] of the energy along Uf and along Up, and calls that were not finite.
        lost: float64 [6], what a call adds to them that was not finite.
    """

    totals: Tensor
    lost: Tensor

    def __init__(self, subspace: LayerSubspace, device: torch.device, epsilon: float = 1e-12) -> None:
        super().__init__(subspace, device)
        self.epsilon = epsilon
        self.register_buffer("totals", torch.zeros(6, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("lost", torch.eye(6, dtype=torch.float64, device=device)[-1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.basis.shape[0]:
            raise ValueError(
                f"the subspaces are of width {self.basis.shape[0]}, the output to protect of {x.shape[-1]}; "
                "fit them on this backbone, or choose other hsw.writers"
            )
        out: Tensor = _Cut.apply(x, self.operate)  # type: ignore[no-untyped-call]
        return out

    def operate(self, g: Tensor) -> Tensor:
        """The gradient that goes on, of g's shape and dtype; computed in float32 at least."""
        with torch.autocast(g.device.type, enabled=False):
            x = g.to(torch.promote_types(g.dtype, self.basis.dtype)).reshape(-1, g.shape[-1])
            basis = self.basis.to(x.dtype)
            along = x @ basis
            cut = torch.addmm(x, along * self.weight, basis.T, alpha=-1)
            before, after = torch.linalg.vector_norm(x), torch.linalg.vector_norm(cut)
            scale = torch.where(after > before, before / (after + self.epsilon), 1.0)
            finite = torch.isfinite(before)  # one pass less over x than to ask each of its values
            size = before.clamp(min=torch.finfo(x.dtype).tiny)
            shares = (torch.linalg.vector_norm(along, dim=0) / size).square()
            parts = shares[: self.fragile].sum(), shares[self.fragile :].sum()
            row = torch.stack([torch.ones_like(before), before, after * scale, *parts, torch.zeros_like(before)])
            self.totals.add_(torch.where(finite, row.double(), self.lost))
            return torch.where(finite, cut.mul_(scale).view(g.shape).to(g.dtype), g)


class HSW(Method):
    """The surgeries on a model, by site: `layer14`, or `layer14.o_proj` among writers."""

    def __init__(self, sites: dict[str, tuple[nn.Module, LayerSubspace]], config: HSWConfig) -> None:
        self.surgeries: dict[str, GradientSurgery] = {}
        self._handles = []
        for name, (module, subspace) in sites.items():
            device = next(module.parameters(), subspace.fragile).device
            self.surgeries[name] = GradientSurgery(subspace, device, config.epsilon)
            self._handles.append(edit_output(module, self.surgeries[name]))
        self.set_gains(config.gains)

    def set_gains(self, gains: Gains) -> None:
        """From the next backward pass on; ValueError unless beta and gamma are in [0, 2]."""
        gains.check(HSWConfig.largest_gain)
        for surgery in self.surgeries.values():
            surgery.set_gains(gains)

    def readings(self) -> dict[str, float]:
        """Means over the backward calls since the last reading, per site (`layer14.norm_before`) and over all.

        norm_before, norm_after: of the gradient; fragile_energy, plastic_energy: shares of its energy along Uf
        and Up before the cut, in [0, 1]; nonfinite: how many gradients were not finite, a count that no mean
        includes. Means are left out where no finite gradient came by. Copies from the device once.
        """
        totals = torch.stack([surgery.totals for surgery in self.surgeries.values()])
        for surgery in self.surgeries.values():
            surgery.totals.zero_()
        rows = dict(zip(self.surgeries, totals.tolist(), strict=True))
        rows[""] = [sum(column) for column in zip(*rows.values(), strict=True)]
        readings = {}
        for name, (calls, *sums, nonfinite) in rows.items():
            prefix = f"{name}." if name else ""
            readings[f"{prefix}nonfinite"] = nonfinite
            if calls:
                readings |= {f"{prefix}{key}": value / calls for key, value in zip(_READINGS, sums, strict=True)}
        return readings

    def remove(self) -> None:
        """Leaves the model as it was before."""
        for handle in self._handles:
            handle.remove()


def _inside(layer: nn.Module, number: int, config: HSWConfig) -> dict[str, nn.Module]:
    """The sites of one layer, by the end of their name."""
    if config.sites != "writers":
        return {"": layer}
    named = {path.rsplit(".", 1)[-1]: module for path, module in layer.named_modules()}
    missing = [name for name in config.writers if name not in named]
    if missing:
        raise ValueError(f"hsw.writers names {missing}, which layer {number} does not have")
    return {f".{name}": named[name] for name in config.writers}
