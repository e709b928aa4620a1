"""A method from outside of the package: the learned part of each weight decays at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ipvla.forgetting import Gains, Method, MethodConfig, Target
from ipvla.forgetting.method import Factors


@MethodConfig.register_subclass("adapter_decay")
@dataclass(frozen=True)
class AdapterDecayConfig(MethodConfig):
    """kappa: share of each adapter's B that decays per step, in [0, 1)."""

    gained: ClassVar[tuple[str, ...]] = ("kappa",)

    kappa: float = 0.0

    def install(self, target: Target) -> Method:
        return AdapterDecay(target.factors(), self.gains)


class AdapterDecay(Method):
    """B <- (1 - kappa) B after the optimizer's step."""

    def __init__(self, factors: Factors, gains: Gains) -> None:
        self._factors = [b for _, b in factors.values()]
        self.set_gains(gains)

    def set_gains(self, gains: Gains) -> None:
        gains.check()
        self._kappa = gains.kappa

    @torch.no_grad()
    def after(self) -> None:
        for b in self._factors:
            b.mul_(1 - self._kappa)

    def readings(self) -> dict[str, float]:
        return {"norm": sum(float(b.detach().norm()) for b in self._factors)}
