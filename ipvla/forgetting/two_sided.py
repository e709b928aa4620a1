"""Two-sided surgery: an optimizer's step on an adapter is damped softly on both of its sides, and B decays.

    dB <- (I + lambda G)^-1 dB,  dA <- dA (I + lambda A)^-1,  then B <- (1 - kappa) B

where dA and dB are what the step did to the factors, weight decay included, A is the second moment of the module's
inputs in the base policy, and G that of the gradients of its output (`module_statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ipvla.forgetting.directions import DampedSpectrum
from ipvla.forgetting.method import Factors, Gains, Method, MethodConfig, Target, require_all
from ipvla.forgetting.module_statistics import ModuleStatistics


@MethodConfig.register_subclass("two_sided")
@dataclass(frozen=True)
class TwoSidedConfig(MethodConfig):
    """On every adapter of a linear module; all 0 leaves the update alone.

    Attributes:
        lam: lambda >= 0 in (I + lambda M)^-1, in units of 1 / (the moment's mean eigenvalue, which is 1).
        kappa: share of B that decays per step, in [0, 1), whatever the learning rate.
    """

    gained: ClassVar[tuple[str, ...]] = ("lam", "kappa")
    shards: ClassVar[bool] = True

    lam: float = 0.0
    kappa: float = 0.0

    def build(self, factors: Factors, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> TwoSided:
        """`statistics`: by module name, A [in, in] of its inputs and G [out, out] of its output's gradients."""
        return TwoSided(factors, statistics, self.gains)

    def install(self, target: Target) -> Method:
        return self.build(target.factors(), target.measured(ModuleStatistics).modules)


class TwoSided(Method):
    """Damps the update of B where the teacher's output is sensitive, that of A where its inputs are large.

    Raises:
        ValueError: a module has no statistics, or they are of another size, or no second moments.
    """

    _earlier: list[tuple[Tensor, Tensor]]

    def __init__(self, factors: Factors, statistics: Mapping[str, tuple[Tensor, Tensor]], gains: Gains) -> None:
        require_all(factors, statistics, "statistics")
        self._factors = list(factors.values())
        self._spectra: list[tuple[DampedSpectrum, DampedSpectrum]] = []
        for name, (a, b) in factors.items():
            of_inputs, of_gradients = statistics[name]
            self._spectra.append(
                (
                    DampedSpectrum(of_inputs, f"A of {name}", a.shape[1], a.device),
                    DampedSpectrum(of_gradients, f"G of {name}", b.shape[0], b.device),
                )
            )
        self.set_gains(gains)

    def set_gains(self, gains: Gains) -> None:
        gains.check()
        self._kappa = gains.kappa
        for spectra in self._spectra:
            for spectrum in spectra:
                spectrum.set_gains(gains)

    @torch.no_grad()
    def before(self) -> None:
        self._earlier = [(a.clone(), b.clone()) for a, b in self._factors]

    @torch.no_grad()
    def after(self) -> None:
        for (a, b), (for_a, for_b), (a0, b0) in zip(self._factors, self._spectra, self._earlier, strict=True):
            a.sub_(for_a.removed(a - a0))
            b.sub_(for_b.removed((b - b0).T).T).mul_(1 - self._kappa)
        self._earlier = []
