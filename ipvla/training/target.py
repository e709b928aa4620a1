"""The policy in training as a method against forgetting sees it, and what was measured of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ipvla.data.probe import ProbeSet
from ipvla.data.transforms import Transforms
from ipvla.forgetting.artifact import ArtifactIdentity
from ipvla.forgetting.method import Factors, Part
from ipvla.forgetting.subspaces import Subspaces
from ipvla.forgetting.weight_penalty import FullChange, LowRankChange, WeightChange
from ipvla.models.adapters import adapters, begin_by_corda, factors, layer_of
from ipvla.models.vla import IPVLA, fresh_parts
from ipvla.policy import is_sharded, sharded_like, whole
from ipvla.training.readers import FeatureReader
from ipvla.types import ModelInputs

#: What a name inside `backbone.vlm` is preceded by in the model.
VLM = "backbone.vlm."


class WholeFactors:
    """Copies of sharded A and B, the same on every worker; what is not sharded is taken as it is.

    Every worker corrects its copies in the same way and takes its own part of them over into its weights.
    """

    def __init__(self) -> None:
        self._copies: dict[nn.Parameter, nn.Parameter] = {}

    def of(self, factors: Factors) -> Factors:
        """Each of `factors` in full."""
        return {name: (self._in_full(a), self._in_full(b)) for name, (a, b) in factors.items()}

    @torch.no_grad()
    def fetch(self) -> None:
        """Makes the copies equal to the sharded weights; every worker must ask."""
        for parameter, copy in self._copies.items():
            copy.copy_(whole(parameter))

    @torch.no_grad()
    def put_back(self) -> None:
        """Takes the copies over into the sharded weights."""
        for parameter, copy in self._copies.items():
            parameter.copy_(sharded_like(copy.detach(), parameter))

    def _in_full(self, parameter: nn.Parameter) -> nn.Parameter:
        if not is_sharded(parameter):
            return parameter
        if parameter not in self._copies:
            full: Tensor = whole(parameter.detach()).clone()
            self._copies[parameter] = nn.Parameter(full, requires_grad=False)
        return self._copies[parameter]


@dataclass(frozen=True)
class PolicyTarget:
    """`ipvla.forgetting.method.Target` of a policy; parts of the artifact are read when a method asks for them.

    Attributes:
        model: with its adapters, before training.
        backbone: its name, `model.backbone.type`.
        optimizer: of the model.
        transforms: those of the training.
        artifact: directory that `ray_jobs.subspaces` wrote.
        teacher_sha256: of the policy that the artifact must have been made from; None for any.
        probe: None where neither method nor Thermostat read it.
        seed: of what is drawn from the probe.
        whole_factors: of the adapters that a method corrects.
    """

    model: IPVLA
    backbone: str
    optimizer: torch.optim.AdamW
    transforms: Transforms
    artifact: Path
    teacher_sha256: str | None
    probe: ProbeSet | None
    seed: int
    whole_factors: WholeFactors = field(default_factory=WholeFactors)

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
    def student(self) -> FeatureReader:
        return FeatureReader(self.model, self.backbone)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.model.backbone.language_layers()

    @cached_property
    def subspaces(self) -> Subspaces:
        return Subspaces.load(self.artifact, **self.identity)

    def measured(self, part: type[Part]) -> Part:
        if not (self.artifact / f"{part.name}.json").exists():
            raise ValueError(
                f"{self.artifact} has no {part.contents}, which this forgetting.method needs; "
                f"make it again by ray_jobs.subspaces with {part.request}"
            )
        # A part that an earlier run of the job left behind is not of this artifact.
        meta = self.subspaces.meta
        same = {name: meta.get(name) for name in ("teacher_sha256", "probe_sha256")}
        return part.load(self.artifact, {**self.identity, **same})

    def factors(self, include: Callable[[str], bool] = lambda name: True) -> Factors:
        linear = factors(self.model.backbone)
        return self.whole_factors.of({name: pair for name, pair in linear.items() if include(name)})

    def all_factors(self) -> Factors:
        every, linear = adapters(self.model.backbone), factors(self.model.backbone)
        if not linear:
            raise ValueError(
                "this forgetting.method works on LoRA adapters; set model.lora, or take another method"
            )
        if other := sorted(every.keys() - linear.keys()):
            raise ValueError(
                f"model.lora.extra puts adapters on {other}, which are not linear; "
                "this forgetting.method cannot protect them: leave them out"
            )
        return self.factors()

    def layer_of(self, module: str) -> int | None:
        return layer_of(self.model.backbone, module)

    def changes(self, known: Mapping[str, torch.Size] | None = None) -> dict[str, WeightChange]:
        changes: dict[str, WeightChange]
        if by_name := adapters(self.model.backbone):
            changes = {f"{VLM}{name}.weight": LowRankChange(x.a, x.b, x.scale) for name, x in by_name.items()}
        else:
            changes = {name: FullChange(p) for name, p in self.model.named_parameters() if p.requires_grad}
        if known is None:
            return changes
        fresh = fresh_parts({name: change.shape for name, change in changes.items()}, known)
        return {name: change for name, change in changes.items() if name.partition(".")[0] not in fresh}

    def records(self, numbers: Sequence[int]) -> ModelInputs:
        assert self.probe is not None, "opened for a method that reads it"
        return self.probe.batch(self.transforms, numbers)

    def begin_by_corda(self, covariances: Mapping[str, Tensor]) -> None:
        begin_by_corda(self.model.backbone, covariances)
