"""Methods on second moments of the teacher's modules (`module_statistics`): CorDA, GPM, input decay, two-sided.

All but the last act on A [r, in] of every adapter by M, the second moment of its module's inputs in the base
policy; all adapters must be on linear modules.
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


@MethodConfig.register_subclass("corda")
@dataclass(frozen=True)
class CorDAConfig(MethodConfig):
    """CorDA: adapters begin in the directions that matter least to the teacher (arXiv 2406.05223).

    In the knowledge-preserved mode, by PEFT's arithmetic (`ipvla.models.adapters`); training itself is left alone.
    """

    moves_base: ClassVar[bool] = True

    def install(self, target: Target) -> Method:
        names = target.all_factors()
        moments = target.measured(ModuleStatistics).of_inputs
        target.begin_by_corda({name: moment for name, moment in moments.items() if name in names})
        return Method()


@MethodConfig.register_subclass("gpm")
@dataclass(frozen=True)
class GPMConfig(MethodConfig):
    """Adapters never act on what the teacher's inputs span (arXiv 2103.09762); see `GPM`.

    Attributes:
        energy: share of the inputs' second moment that is protected, in (0, 1].
    """

    shards: ClassVar[bool] = True

    energy: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"the energy of gpm is {self.energy}; it must be above 0 and at most 1")

    def build(self, factors: Factors, moments: Mapping[str, Tensor]) -> GPM:
        """Projects A at once. `moments`: by module name, of its inputs [in, in]."""
        return GPM(factors, {name: input_space(moment, self.energy) for name, moment in moments.items()})

    def install(self, target: Target) -> Method:
        return self.build(target.all_factors(), target.measured(ModuleStatistics).of_inputs)


class GPM(Method):
    """What a module does to inputs like the teacher's never changes, whatever is trained.

    M spans a module's inputs on the probe: the first eigenvectors of their second moment that hold the share
    `energy` of its trace (Saha, Garg and Roy, arXiv 2103.09762). A stays orthogonal to M, so that dW M = (alpha /
    r) B A M is 0 (for adapters: Liang and Li, InfLoRA, arXiv 2404.00228): at installation, and again after every
    optimizer step, since AdamW's steps do not stay in the space of their gradients.

    Args:
        factors: by module name; B must be 0, so that the projection changes no output.
        spaces: by module name, orthonormal columns [in, k].

    Raises:
        ValueError: a module has no space, or one of another width; its space leaves nothing to learn; B is not 0.
    """

    def __init__(self, factors: Factors, spaces: Mapping[str, Tensor]) -> None:
        require_all(factors, spaces, "input space")
        self._spaces: list[tuple[Tensor, Tensor]] = []
        for name, (a, b) in factors.items():
            width, protected = spaces[name].shape
            if width != a.shape[1]:
                raise ValueError(
                    f"the input space of {name} is of width {width}, its adapter of {a.shape[1]}; "
                    "collect the module statistics of this model"
                )
            if protected == width:
                raise ValueError(
                    f"the teacher's inputs of {name} take all {width} dimensions, nothing is left to learn in; "
                    "lower forgetting.method.energy"
                )
            if b.detach().count_nonzero():
                raise ValueError(
                    f"B of {name} is not 0, so that to project A would change the policy; "
                    "start from a policy without adapters"
                )
            self._spaces.append((a, spaces[name].to(a.device, torch.promote_types(a.dtype, torch.float32))))
        self.after()

    @property
    def protected_share(self) -> float:
        """Mean over the modules of k / in."""
        shares = [space.shape[1] / space.shape[0] for _, space in self._spaces]
        return sum(shares) / len(shares)

    def readings(self) -> dict[str, float]:
        return {"protected_share": self.protected_share}

    @torch.no_grad()
    def after(self) -> None:
        for a, space in self._spaces:
            a.sub_(((a.to(space.dtype) @ space) @ space.T).to(a.dtype))


def input_space(moment: Tensor, energy: float) -> Tensor:
    """The fewest first eigenvectors of a second moment [n, n] that hold `energy` of its trace: float64 [n, k]."""
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
    reached = values.cumsum(0) >= energy * values.sum() * (1 - torch.finfo(values.dtype).eps * len(values))
    space: Tensor = vectors[:, : int(reached.int().argmax()) + 1]
    return space


@MethodConfig.register_subclass("input_decay")
@dataclass(frozen=True)
class InputDecayConfig(MethodConfig):
    """Adapters decay along the teacher's inputs after every step; see `InputDecay`.

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
    """After every step an adapter's A decays along what its module is given: A <- A (I + lambda M)^-1.

    This is the proximal operator of lambda / 2 E ||A x||^2 over the probe's inputs x, decoupled from the gradient
    as AdamW's weight decay is (Loshchilov and Hutter, arXiv 1711.05101). What an adapter adds on old inputs is
    pulled back to nothing, its initial part included; inputs that are new keep what they have learned. GPM is the
    limit of a large lambda on the first eigenvectors alone.

    Raises:
        ValueError: a module has no moment, or one of another size, or that is no second moment.
    """

    def __init__(self, factors: Factors, moments: Mapping[str, Tensor], gains: Gains) -> None:
        require_all(factors, moments, "moments")
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


@MethodConfig.register_subclass("two_sided")
@dataclass(frozen=True)
class TwoSidedConfig(MethodConfig):
    """A step on an adapter is damped on both of its sides; see `TwoSided`.

    Of all adapters it takes those on linear modules. All 0 leaves the update alone.

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
    """An optimizer's step on an adapter is damped softly on both of its sides, and B decays.

        dB <- (I + lambda G)^-1 dB,  dA <- dA (I + lambda A)^-1,  then B <- (1 - kappa) B

    where dA and dB are what the step did to the factors, weight decay included, A is the second moment of the
    module's inputs, and G that of the gradients of its output: B's update is damped where the teacher's output is
    sensitive, A's where its inputs are large.

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
