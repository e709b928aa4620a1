"""Surgery on what the optimizer does to LoRA factors A [r, in] and B [out, r], rather than on gradients.

    with surgery.around():
        optimizer.step()

What an adapter adds to its module's output is B A x, so a part along Uf is only ever written by columns of B, and
an update of B that has nothing along Uf writes nothing there, whatever the optimizer did to the gradient.

    projected update  dB <- dB - (1 - gamma) Uf Uf' dB - (1 - beta) Up Up' dB
    routed moments    the same cut on AdamW's first moment, while its second moment keeps the raw gradient's size
    two-sided         dB <- (I + lambda G)^-1 dB,  dA <- dA (I + lambda A)^-1,  then B <- (1 - kappa) B
    input decay       A <- A (I + lambda M)^-1, M being the second moment of the module's inputs in the base policy

where dB is what the step did to B, its weight decay included. At gains of 1, and at lambda = kappa = 0, weights
stay bit for bit what the optimizer made them. The first two are for modules that write into the residual stream,
whose output is of the subspaces' width; the others are for any.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipvla.forgetting.directions import DampedSpectrum, GainedSubspace, check_gains
from ipvla.forgetting.subspaces import LayerSubspace

#: By module name: A [r, in] and B [out, r].
Factors = Mapping[str, tuple[nn.Parameter, nn.Parameter]]


class UpdateSurgery(ABC):
    """Corrects parameters in place after the optimizer's step."""

    @abstractmethod
    def before(self) -> None:
        """Keeps what `after` needs to know of the state before the step."""

    @abstractmethod
    def after(self) -> None:
        """Corrects the parameters."""

    @contextmanager
    def around(self) -> Iterator[None]:
        """`before` and `after` around one optimizer step; a step that raises is not corrected."""
        self.before()
        yield
        self.after()


@dataclass(frozen=True)
class ProjectedUpdateConfig:
    """Gains of the update's parts along Up (beta) and Uf (gamma), in [0, 1]; 1 leaves a part alone."""

    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_gains(self.beta, self.gamma)

    def build(self, factors: Factors, subspaces: Mapping[str, LayerSubspace]) -> ProjectedUpdate:
        """`subspaces`: of each module of `factors`, by its name."""
        return ProjectedUpdate(factors, subspaces, self.beta, self.gamma)


class _GainedUpdate(UpdateSurgery):
    """One set of directions per B, all with the same gains.

    Raises:
        ValueError: a module has no subspace, or its output is not of the subspace's width.
    """

    def __init__(
        self, factors: Factors, subspaces: Mapping[str, LayerSubspace], beta: float, gamma: float
    ) -> None:
        check_names(factors, subspaces, "subspace")
        for name, (_, b) in factors.items():
            width = subspaces[name].fragile.shape[0]
            if b.shape[0] != width:
                raise ValueError(
                    f"B of {name} has {b.shape[0]} rows, its subspace is of width {width}; "
                    "give only modules that write into the residual stream, such as o_proj and down_proj"
                )
        self._directions = {b: GainedSubspace(subspaces[name], b.device) for name, (_, b) in factors.items()}
        self.set_strength(beta, gamma)

    def set_strength(self, beta: float, gamma: float) -> None:
        """From the next step on; ValueError outside [0, 1]."""
        check_gains(beta, gamma)
        for directions in self._directions.values():
            directions.set_gains(beta, gamma)


class ProjectedUpdate(_GainedUpdate):
    """Scales the update's parts along Uf and Up. With gamma = 0, Uf' B never changes, whatever the optimizer."""

    _earlier: list[Tensor]

    @torch.no_grad()
    def before(self) -> None:
        self._earlier = [b.clone() for b in self._directions]

    @torch.no_grad()
    def after(self) -> None:
        for (b, directions), earlier in zip(self._directions.items(), self._earlier, strict=True):
            b.sub_(directions.removed((b - earlier).T).T)
        self._earlier = []


@dataclass(frozen=True)
class RoutedMomentsConfig:
    """Gains of the first moment's parts along Up (beta) and Uf (gamma), in [0, 1]; 1 leaves a part alone."""

    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_gains(self.beta, self.gamma)

    def build(
        self, factors: Factors, subspaces: Mapping[str, LayerSubspace], optimizer: torch.optim.AdamW
    ) -> RoutedMoments:
        """`subspaces`: of each module of `factors`, by its name; `optimizer`: the one that trains them."""
        return RoutedMoments(factors, subspaces, optimizer, self.beta, self.gamma)


class RoutedMoments(_GainedUpdate):
    """Decoupled moment routing (arXiv 2604.22407): gains act on AdamW's first moment, not on its second.

    A gradient cut before Adam shrinks the second moment too, which divides the cut out again. Here both moments
    see the raw gradient, and the step is sum_k gain_k P_k m / (sqrt(v) + eps) instead of m / (sqrt(v) + eps).
    Separate moments m_k of the gradient's parts along Uf, Up and the rest need no room of their own: a running
    mean is linear, so m_k = P_k m, also when the gains change on the way. The strength is that of `set_strength`;
    the paper's own adapts it to the overlap of old and new gradients.

    The division is by element: with gamma = 0 the update still has a little along Uf, `ProjectedUpdate` has none.
    """

    _steps: list[Tensor | float]

    def __init__(
        self,
        factors: Factors,
        subspaces: Mapping[str, LayerSubspace],
        optimizer: torch.optim.AdamW,
        beta: float,
        gamma: float,
    ) -> None:
        super().__init__(factors, subspaces, beta, gamma)
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


@dataclass(frozen=True)
class TwoSidedConfig:
    """Strength of two-sided soft weight surgery; all 0 leaves the update alone.

    Attributes:
        lam: lambda >= 0 in (I + lambda M)^-1, in units of 1 / (the moment's mean eigenvalue, which is 1).
        kappa: share of B that decays per step, in [0, 1), whatever the learning rate.
    """

    lam: float = 0.0
    kappa: float = 0.0

    def __post_init__(self) -> None:
        _check_strength(self.lam, self.kappa)

    def build(self, factors: Factors, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> TwoSided:
        """`statistics`: by module name, A [in, in] of its inputs and G [out, out] of its output's gradients."""
        return TwoSided(factors, statistics, self.lam, self.kappa)


class TwoSided(UpdateSurgery):
    """Damps the update of B where the teacher's output is sensitive, that of A where its inputs are large.

    Raises:
        ValueError: a module has no statistics, or they are of another size, or no second moments.
    """

    _earlier: list[tuple[Tensor, Tensor]]

    def __init__(
        self, factors: Factors, statistics: Mapping[str, tuple[Tensor, Tensor]], lam: float, kappa: float
    ) -> None:
        check_names(factors, statistics, "statistics")
        self._factors = list(factors.values())
        self._spectra: list[tuple[DampedSpectrum, DampedSpectrum]] = []
        for name, (a, b) in factors.items():
            of_inputs, of_gradients = statistics[name]
            self._spectra.append(
                (
                    _spectrum(of_inputs, f"A of {name}", a.shape[1], a.device),
                    _spectrum(of_gradients, f"G of {name}", b.shape[0], b.device),
                )
            )
        self.set_strength(lam, kappa)

    def set_strength(self, lam: float, kappa: float) -> None:
        """From the next step on; nothing is decomposed again."""
        _check_strength(lam, kappa)
        self._kappa = kappa
        for spectra in self._spectra:
            for spectrum in spectra:
                spectrum.set_damping(lam)

    @torch.no_grad()
    def before(self) -> None:
        self._earlier = [(a.clone(), b.clone()) for a, b in self._factors]

    @torch.no_grad()
    def after(self) -> None:
        for (a, b), (for_a, for_b), (a0, b0) in zip(self._factors, self._spectra, self._earlier, strict=True):
            a.sub_(for_a.removed(a - a0))
            b.sub_(for_b.removed((b - b0).T).T).mul_(1 - self._kappa)
        self._earlier = []


@dataclass(frozen=True)
class InputDecayConfig:
    """lam: lambda >= 0 in (I + lambda M)^-1, in units of 1 / (M's mean eigenvalue, which is 1); 0 is no decay."""

    lam: float = 0.0

    def __post_init__(self) -> None:
        _check_strength(self.lam, 0.0)

    def build(self, factors: Factors, moments: Mapping[str, Tensor]) -> InputDecay:
        """`moments`: by module name, M [in, in] of its inputs."""
        return InputDecay(factors, moments, self.lam)


class InputDecay(UpdateSurgery):
    """Lets A decay, after every step, along what the base policy's modules are given, and nowhere else.

    A (I + lambda M)^-1 is the proximal operator of lambda / 2 E ||A x||^2 over the probe's inputs x, decoupled
    from the gradient as AdamW's weight decay is (Loshchilov and Hutter, arXiv 1711.05101). What an adapter adds on
    old inputs is pulled back to nothing, what it began with there included; inputs that are new keep what they
    have learned. GPM (`ipvla.forgetting.gpm`) is the limit of a large lambda on the first eigenvectors alone.

    Raises:
        ValueError: a module has no moment, or one of another size, or that is no second moment.
    """

    def __init__(self, factors: Factors, moments: Mapping[str, Tensor], lam: float) -> None:
        check_names(factors, moments, "moments")
        self._inputs = [
            (a, _spectrum(moments[name], f"M of {name}", a.shape[1], a.device)) for name, (a, _) in factors.items()
        ]
        self.set_strength(lam)

    def set_strength(self, lam: float) -> None:
        """From the next step on; nothing is decomposed again."""
        _check_strength(lam, 0.0)
        for _, spectrum in self._inputs:
            spectrum.set_damping(lam)

    def before(self) -> None:
        """Nothing: the decay does not depend on the state before."""

    @torch.no_grad()
    def after(self) -> None:
        for a, spectrum in self._inputs:
            a.sub_(spectrum.removed(a))


def _spectrum(moment: Tensor, name: str, width: int, device: torch.device) -> DampedSpectrum:
    if moment.shape != (width, width):
        raise ValueError(
            f"{name} is {list(moment.shape)}, the adapter needs [{width}, {width}]; "
            "collect the module statistics of this model"
        )
    return DampedSpectrum(moment, name, device)


def _check_strength(lam: float, kappa: float) -> None:
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam is {lam}; it must be finite and at least 0")
    if not 0 <= kappa < 1:
        raise ValueError(f"kappa is {kappa}; it must be in [0, 1)")


def check_names(factors: Factors, given: Mapping[str, object], what: str) -> None:
    """ValueError unless there are factors, and something is given for every one of them."""
    if not factors:
        raise ValueError("there are no LoRA factors to correct; apply adapters first, and name their modules")
    missing = [name for name in factors if name not in given]
    if missing:
        raise ValueError(f"no {what} for {missing}; give one for every module with an adapter")
