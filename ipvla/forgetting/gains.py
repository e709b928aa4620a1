"""The numbers that turn a forgetting method, set by hand or by the Thermostat."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Gains:
    """A method uses the gains that its config names in `gained`; the defaults leave training as it is.

    Attributes:
        beta, gamma: share >= 0 of a gradient or an update that remains in the plastic and in the fragile subspace.
        lam: lambda >= 0 of two-sided surgery or of input decay.
        kappa: share of the adapters that decays per step, in [0, 1).
    """

    beta: float = 1.0
    gamma: float = 1.0
    lam: float = 0.0
    kappa: float = 0.0

    def check(self, largest: float = 1.0) -> None:
        """ValueError unless beta and gamma are in [0, largest], lam is finite and >= 0, and kappa is in [0, 1)."""
        for name, value in (("beta", self.beta), ("gamma", self.gamma)):
            if not 0 <= value <= largest:
                raise ValueError(f"{name} is {value}; it must be in [0, {largest:g}]")
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam is {self.lam}; it must be finite and at least 0")
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa is {self.kappa}; it must be in [0, 1)")

    def metrics(self, names: Iterable[str]) -> dict[str, float]:
        """The gains of these field names as training logs them: `gain/beta`, `gain/lambda`."""
        return {f"gain/{'lambda' if name == 'lam' else name}": getattr(self, name) for name in names}
