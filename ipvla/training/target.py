"""What a method against forgetting works on, and what its teacher has left for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ipvla.data.probe import ProbeSet
from ipvla.data.transforms import Transforms
from ipvla.forgetting.adapter_update import Factors
from ipvla.forgetting.distillation import TeacherOutputs
from ipvla.forgetting.fisher import DiagonalFisher
from ipvla.forgetting.module_statistics import ModuleStatistics
from ipvla.forgetting.subspaces import ArtifactIdentity, Subspaces
from ipvla.forgetting.weight_change import FullChange, LowRankChange, WeightChange
from ipvla.models.lora import adapters, factors
from ipvla.models.vla import IPVLA
from ipvla.training.feature_reader import ProbedPolicy

#: What a name inside `backbone.vlm` is preceded by in the model.
VLM = "backbone.vlm."


@dataclass(frozen=True)
class Target:
    """The parts of the teacher's artifact are read when a method first asks for them.

    Each raises ArtifactError if it is damaged, or of another backbone, size, teacher or (if opened) probe.

    Attributes:
        model: with its adapters, before training.
        backbone: its name, `model.backbone.type`.
        optimizer: of the model.
        transforms: those of the training.
        artifact: directory that `ray_jobs.subspaces` wrote.
        teacher_sha256: of the policy that the artifact must have been made from; None for any.
        probe: None where neither method nor Thermostat read it.
        seed: of what is drawn from the probe.
    """

    model: IPVLA
    backbone: str
    optimizer: torch.optim.AdamW
    transforms: Transforms
    artifact: Path
    teacher_sha256: str | None
    probe: ProbeSet | None
    seed: int

    @cached_property
    def identity(self) -> ArtifactIdentity:
        """What an artifact's meta must agree with; None for anything."""
        return {
            "backbone": self.backbone,
            "width": self.model.backbone.width,
            "probe_sha256": self.probe.sha256 if self.probe else None,
            "num_layers": self.model.backbone.num_layers,
            "teacher_sha256": self.teacher_sha256,
        }

    @cached_property
    def policy(self) -> ProbedPolicy:
        """The student, as the forgetting room reads it."""
        return ProbedPolicy(self.model, self.backbone)

    @cached_property
    def subspaces(self) -> Subspaces:
        return Subspaces.load(self.artifact, **self.identity)

    @cached_property
    def statistics(self) -> ModuleStatistics:
        """ValueError if they were not collected."""
        self._check("module_statistics.json", "module statistics", "--adapters as model.lora")
        return ModuleStatistics.load(self.artifact, **self.identity)

    @cached_property
    def fisher(self) -> DiagonalFisher:
        """ValueError if it was not measured."""
        self._check("fisher.json", "Fisher information", "--fisher.weights adapters (or all)")
        return DiagonalFisher.load(self.artifact, self._same_teacher)

    @cached_property
    def outputs(self) -> TeacherOutputs:
        """ValueError if they were not kept."""
        self._check("outputs.json", "outputs of the teacher", "this version")
        return TeacherOutputs.load(self.artifact, self._same_teacher)

    def linear_factors(self) -> Factors:
        """LoRA's factors by module name; ValueError unless there are adapters, all on linear modules."""
        found, linear = adapters(self.model.backbone), factors(self.model.backbone)
        if not linear:
            raise ValueError(
                "this forgetting.method works on LoRA adapters; set model.lora, or take another method"
            )
        if other := sorted(found.keys() - linear.keys()):
            raise ValueError(
                f"model.lora.extra puts adapters on {other}, which are not linear; "
                "this forgetting.method cannot protect them: leave them out"
            )
        return linear

    def changes(self) -> dict[str, WeightChange]:
        """What training will add to the weights, by their names in a model without adapters.

        Of the adapters alone where there are some, else of every weight that is trained.

        Raises:
            ValueError: the adapters are not LoRA's.
        """
        if found := adapters(self.model.backbone):
            return {f"{VLM}{name}.weight": LowRankChange(f.a, f.b, f.scale) for name, f in found.items()}
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: FullChange(p) for name, p in trained.items()}

    @property
    def _same_teacher(self) -> dict[str, Any]:
        """A part that an earlier run of the job left behind is not of this artifact."""
        meta = self.subspaces.meta
        return {**self.identity, **{name: meta.get(name) for name in ("teacher_sha256", "probe_sha256")}}

    def _check(self, name: str, what: str, remedy: str) -> None:
        if not (self.artifact / name).exists():
            raise ValueError(
                f"{self.artifact} has no {what}, which this forgetting.method needs; "
                f"make it again by ray_jobs.subspaces with {remedy}"
            )
