"""Distillation on the probe: the student's output is held near the teacher's where the teacher was recorded.

    penalty = weight * mean over drawn records of KL(teacher || student)

(Hinton, Vinyals and Dean, arXiv 1503.02531, at temperature 1; against forgetting: Li and Hoiem, arXiv 1606.09282.)
The teacher's outputs are measured offline, so that training holds no teacher. The records are trained on: a probe
that is distilled from can no longer judge what was forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ipvla.forgetting.artifact import Measured, identity_of
from ipvla.forgetting.method import Method, MethodConfig, Target
from ipvla.forgetting.probed import ProbedModel


@dataclass(frozen=True)
class TeacherOutputs(Measured):
    """What the teacher puts out for every record of a probe.

    Attributes:
        outputs: [N, ...], parameters of the output distribution, on the CPU, row i of record i.
    """

    name: ClassVar[str] = "outputs"
    contents: ClassVar[str] = "outputs of the teacher"
    request: ClassVar[str] = "this version"

    outputs: Tensor

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"outputs": self.outputs}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        return cls(meta, tensors["outputs"])

    @classmethod
    @torch.no_grad()
    def measure(cls, model: ProbedModel, batches: Sequence[Any], meta: Mapping[str, Any]) -> Self:
        """From one pass of the teacher over the whole probe, in the order of its records."""
        outputs = torch.cat([model.read(batch).output.cpu() for batch in batches])
        return cls({**meta, **identity_of(model, meta)}, outputs)


@MethodConfig.register_subclass("distillation")
@dataclass(frozen=True)
class DistillationConfig(MethodConfig):
    """How much and on what; the records are those of `forgetting.probe`.

    Attributes:
        weight: of the penalty, >= 0; 0 leaves training alone.
        batch: probe records per step.
    """

    reads_probe: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    weight: float = 0.0
    batch: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"the weight of distillation is {self.weight}; it must be finite and at least 0")
        if self.batch < 1:
            raise ValueError(f"the batch of distillation is {self.batch}; it must be at least 1")

    def build(
        self, model: ProbedModel, batch_of: Callable[[Sequence[int]], Any], teacher: TeacherOutputs, seed: int
    ) -> Distillation:
        """`batch_of`: the model's batch of these records of the probe; `seed`: of their draw."""
        return Distillation(model, batch_of, teacher.outputs, self, seed)

    def install(self, target: Target) -> Method:
        if not self.weight:
            return Method()
        return self.build(target.student, target.records, target.measured(TeacherOutputs), target.seed)


class Distillation(Method):
    """See the module's docstring; what a step draws is a pure function of seed and step.

    Raises:
        ValueError: the probe has fewer records than `batch`.
    """

    def __init__(
        self,
        model: ProbedModel,
        batch_of: Callable[[Sequence[int]], Any],
        teacher: Tensor,
        config: DistillationConfig,
        seed: int,
    ) -> None:
        if config.batch > len(teacher):
            raise ValueError(
                f"distillation draws {config.batch} records of a probe of {len(teacher)}; "
                "lower forgetting.method.batch or take a larger probe"
            )
        self._model, self._batch_of, self._teacher = model, batch_of, teacher
        self._config, self._seed = config, seed

    def records(self, step: int) -> list[int]:
        """Those of the penalty at `step`, ascending, none twice."""
        random = np.random.default_rng((self._seed, step))
        return sorted(random.choice(len(self._teacher), self._config.batch, replace=False).tolist())

    def penalty(self, step: int) -> Tensor:
        """A float64 scalar in the graph of the model's weights."""
        records = self.records(step)
        output = self._model.read(self._batch_of(records)).output
        reference = self._teacher[records].to(output.device)
        if reference.shape != output.shape:
            raise ValueError(
                f"the teacher's outputs are {list(reference.shape)}, the student's {list(output.shape)}; "
                "distil from the policy that this run starts from"
            )
        return self._config.weight * self._model.divergence(output, reference).mean()
