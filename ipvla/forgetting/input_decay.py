"""Input decay: after every step an adapter's A decays along what the base policy's modules are given.

    A <- A (I + lambda M)^-1

where M is the second moment of the module's inputs in the base policy (`module_statistics`). This is the proximal
operator of lambda / 2 E ||A x||^2 over the probe's inputs x, decoupled from the gradient as AdamW's weight decay
is (Loshchilov and Hutter, arXiv 1711.05101). What an adapter adds on old inputs is pulled back to nothing, its
initial part included; inputs that are new keep what they have learned. GPM (`gpm`) is the limit of a large lambda
on the first eigenvectors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ipvla.forgetting.adapter_update import check_names
from ipvla.forgetting.directions import DampedSpectrum
from ipvla.forgetting.gains import Gains
from ipvla.forgetting.method import Factors, Method, MethodConfig, Target
from ipvla.forgetting.module_statistics import ModuleStatistics


@MethodConfig.register_subclass("input_decay")
@dataclass(frozen=True)
class InputDecayConfig(MethodConfig):
    """On every adapter; all of them must be on linear modules.

    Attributes:
        lam: lambda >= 0 in (I + lambda M)^-1, in units of 1 / (M's mean eigenvalue, which is 1); 0 is no decay.
    """

    gained: ClassVar[tuple[str, ...]] = ("lam",)
    shards: ClassVar[bool] = True

    lam: float = 0.0

    def build(self, factors: Factors, moments: Mapping[str, Tensor]) -> InputDecay:
        """`moments`: by module name, M [in, in] of its inputs."""
        return InputDecay(factors, moments, self.gains)

    def install(self, target: Target) -> Method:
        return self.build(target.all_factors(), target.measured(ModuleStatistics).of_inputs)


class InputDecay(Method):
    """See the module's docstring.

    Raises:
        ValueError: a module has no moment, or one of another size, or that is no second moment.
    """

    def __init__(self, factors: Factors, moments: Mapping[str, Tensor], gains: Gains) -> None:
        check_names(factors, moments, "moments")
        self._inputs = [
            (a, DampedSpectrum(moments[name], f"M of {name}", a.shape[1], a.device))
            for name, (a, _) in factors.items()
        ]
        self.set_gains(gains)

    def set_gains(self, gains: Gains) -> None:
        gains.check()
        for _, spectrum in self._inputs:
            spectrum.set_gains(gains)

    @torch.no_grad()
    def after(self) -> None:
        for a, spectrum in self._inputs:
            a.sub_(spectrum.removed(a))
