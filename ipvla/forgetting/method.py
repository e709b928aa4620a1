"""What a forgetting method is: a choice of settings, installed on a model before training.

A method is a `MethodConfig` that is registered under its name, and a `Method` that training calls at every
optimizer step, in one file of this folder. The line that imports it in `ipvla/forgetting/__init__.py` makes it a
choice of `forgetting.method`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import draccus
import torch
from torch import Tensor, nn

from ipvla.forgetting.artifact import Measured
from ipvla.forgetting.probed import ProbedModel
from ipvla.forgetting.subspaces import Subspaces

if TYPE_CHECKING:
    from ipvla.forgetting.weight_penalty import WeightChange

Part = TypeVar("Part", bound=Measured)
#: By module name: LoRA's A [r, in] and B [out, r].
Factors = Mapping[str, tuple[nn.Parameter, nn.Parameter]]


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


class Target(Protocol):
    """The model that is about to be fine-tuned, as tensors and layers, and what was measured of its teacher.

    Attributes:
        layers: the language layers, first to last; each puts out [B, N, D], or a tuple that begins with it.
        optimizer: of the weights that are trained.
        student: the model, to be read on the probe.
        subspaces: the teacher's; ArtifactError if they are missing, damaged or of something else.
        seed: of what a method draws.
    """

    @property
    def layers(self) -> Sequence[nn.Module]: ...

    @property
    def optimizer(self) -> torch.optim.AdamW: ...

    @property
    def student(self) -> ProbedModel: ...

    @property
    def subspaces(self) -> Subspaces: ...

    @property
    def seed(self) -> int: ...

    def measured(self, part: type[Part]) -> Part:
        """Another part of the teacher's artifact.

        Raises:
            ArtifactError: it is damaged, or of another teacher, probe or model.
            ValueError: it was not measured.
        """

    def factors(self, include: Callable[[str], bool] = ...) -> Factors:
        """A and B of the adapters on linear modules that `include` accepts by name; none without adapters.

        Where weights are sharded these are whole copies, which training keeps in step with the weights.

        Raises:
            ValueError: the adapters are not LoRA's.
        """

    def all_factors(self) -> Factors:
        """`factors` of every adapter; ValueError unless there are adapters, all on linear modules."""

    def layer_of(self, module: str) -> int | None:
        """The language layer that a module of `factors` belongs to; None outside of them."""

    def changes(self, known: Mapping[str, torch.Size] | None = None) -> dict[str, WeightChange]:
        """What training will add to the weights, by their names in a model without adapters.

        Of the adapters alone where there are some, else of every weight that is trained.

        Args:
            known: shapes of the teacher's weights by name; parts of the model that the teacher lacks are left out.

        Raises:
            ValueError: the adapters are not LoRA's.
        """

    def records(self, numbers: Sequence[int]) -> Any:
        """The student's batch of these records of the probe; for a method that `reads_probe`."""

    def begin_by_corda(self, covariances: Mapping[str, Tensor]) -> None:
        """Splits each adapted weight by the second moments [in, in] of its inputs, see `ipvla.models.adapters`."""


class Method:
    """An installed method. This one leaves training alone."""

    def set_gains(self, gains: Gains) -> None:
        """From the next step on; ValueError if a gain is out of range. For a method that has gains."""
        raise NotImplementedError

    def penalty(self, step: int) -> Tensor | None:
        """A scalar in the graph of the weights, added to the loss of optimizer step `step`; None for nothing."""
        return None

    def before(self) -> None:
        """Remembers what `after` needs to know of the state before the optimizer's step."""

    def after(self) -> None:
        """Corrects the weights in place after the optimizer's step."""

    def readings(self) -> dict[str, float]:
        """What it did since the last reading, by name."""
        return {}


@dataclass(frozen=True)
class MethodConfig(draccus.ChoiceRegistry):
    """A choice by `type`; each says in its module what it does.

    Attributes:
        reads_probe: training takes the probe's records, not only what was measured on them.
        moves_base: installation changes the frozen weights, so that the adapters alone are not what was learned.
        gained: the fields that are gains, of "beta", "gamma", "lam" and "kappa".
        largest_gain: of beta and gamma.
        shards: it works where weights are sharded over workers, `training.sharding` fsdp.
    """

    reads_probe: ClassVar[bool] = False
    moves_base: ClassVar[bool] = False
    gained: ClassVar[tuple[str, ...]] = ()
    largest_gain: ClassVar[float] = 1.0
    shards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.gains.check(self.largest_gain)

    @property
    def gains(self) -> Gains:
        """Those that hold until a Thermostat changes them."""
        return Gains(**{name: getattr(self, name) for name in self.gained})

    def install(self, target: Target) -> Method:
        """Puts it on the target. ValueError if model and artifact do not fit."""
        raise NotImplementedError


def require_all(factors: Factors, given: Mapping[str, object], what: str) -> None:
    """ValueError unless there are factors, and something is given for every one of them."""
    if not factors:
        raise ValueError("there are no LoRA factors to correct; apply adapters first, and name their modules")
    missing = [name for name in factors if name not in given]
    if missing:
        raise ValueError(f"no {what} for {missing}; give one for every module with an adapter")
