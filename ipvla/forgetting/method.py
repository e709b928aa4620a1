"""What a forgetting method is: a choice of settings, installed on a model before training.

A method is one file of this folder: a `MethodConfig` that is registered under its name, and a `Method` that
training calls at every optimizer step. The line that imports it in `ipvla/forgetting/__init__.py` makes it a
choice of `forgetting.method`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import draccus
import torch
from torch import Tensor, nn

from ipvla.forgetting.gains import Gains
from ipvla.forgetting.probed import ProbedModel
from ipvla.forgetting.subspaces import Subspaces
from ipvla.forgetting.weight_change import WeightChange

#: By module name: LoRA's A [r, in] and B [out, r].
Factors = Mapping[str, tuple[nn.Parameter, nn.Parameter]]


class Measured(Protocol):
    """A part of the teacher's artifact that `ray_jobs.subspaces` writes on request.

    Attributes:
        file: name of its JSON file in the artifact.
        contents: what it holds, for errors.
        request: flags of `ray_jobs.subspaces` that produce it, for errors.
    """

    file: ClassVar[str]
    contents: ClassVar[str]
    request: ClassVar[str]

    @classmethod
    def load(cls, directory: Path, expected: Mapping[str, Any]) -> Self:
        """ArtifactError if it is damaged, or its meta lacks the `expected` values."""


Part = TypeVar("Part", bound=Measured)


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
