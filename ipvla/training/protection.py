"""What keeps fine-tuning from forgetting: a method, where it can be at the strength that drift asks for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ipvla.data.probe import ProbeConfig
from ipvla.data.transforms import Transforms
from ipvla.forgetting.drift import DriftProbe
from ipvla.forgetting.thermostat import Gains, Thermostat, ThermostatConfig, ThermostatState
from ipvla.models.vla import IPVLA
from ipvla.training.parallel import World
from ipvla.training.probe_reader import ProbeReader
from ipvla.training.surgery import HSWSurgeryConfig, Surgery, SurgeryConfig
from ipvla.training.target import Target

_NOISE_DRAWS = 200


@dataclass(frozen=True)
class ForgettingConfig:
    """Protection of what pretraining taught. The baseline is the same with `enabled` false: nothing is installed.

    Attributes:
        enabled: the switch.
        artifact: name below the artifact root, as `ray_jobs.subspaces` wrote it from the teacher.
        other_teacher: the artifact's teacher need not be the policy that training starts from: what was protected
            in an earlier fine-tuning goes on being protected.
        method: a choice by its `type`; its gains hold until the Thermostat changes them.
        thermostat: None for constant gains.
        probe: the records that the artifact was made from; read only by the Thermostat and by distillation.
    """

    enabled: bool = True
    artifact: str = "icsm_tiny"
    other_teacher: bool = False
    method: SurgeryConfig = field(default_factory=HSWSurgeryConfig)
    thermostat: ThermostatConfig | None = None
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if self.thermostat is not None and self.method.gains is None:
            raise ValueError(
                f"forgetting.thermostat is set, but {self.method.get_choice_name(type(self.method))} has no gains "
                "to regulate; set it to null, or take another forgetting.method"
            )

    def build(
        self,
        model: IPVLA,
        backbone: str,
        optimizer: torch.optim.AdamW,
        transforms: Transforms,
        artifacts: Path,
        probes: Path,
        seed: int,
        start_sha256: str | None = None,
    ) -> Protection:
        """Installs the method on a model that has its adapters already.

        Args:
            backbone: its name, `model.backbone.type`.
            artifacts, probes: the roots.
            seed: of the records that readings draw.
            start_sha256: of the policy that training starts from; None if from none.

        Raises:
            ArtifactError: the artifact is missing, damaged, or of another backbone, size, probe or teacher.
            DatasetError: Thermostat or method read the probe, but there is none.
            ValueError: method, model and artifact do not fit.
        """
        reads = self.thermostat is not None or self.method.reads_probe
        probe = self.probe.build(probes) if reads else None
        teacher = None if self.other_teacher else start_sha256
        target = Target(model, backbone, optimizer, transforms, artifacts / self.artifact, teacher, probe, seed)
        surgery = self.method.install(target)
        regulation = None
        if self.thermostat is not None and probe is not None:
            drift = DriftProbe.load(
                target.artifact,
                backbone=backbone,
                layers=sorted(target.subspaces.layers),
                probe_sha256=probe.sha256,
            )
            drift.indices(self.thermostat.batch, seed, 0)  # a probe that is too small is told now
            reader = ProbeReader(model, transforms, probe)
            regulation = Regulation(reader, drift, self.thermostat.build(), seed)
        return Protection(surgery, self.method.gains, regulation, self.method.gained)


@dataclass(frozen=True)
class Regulation:
    """What a reading takes: the student on the probe, the teacher's vectors, and who decides upon it."""

    reader: ProbeReader
    drift: DriftProbe
    thermostat: Thermostat
    seed: int

    def read(self, step: int, world: World) -> float:
        """The paired drift at this step, of the records drawn for it; every worker gets the first one's."""
        indices = self.drift.indices(self.thermostat.config.batch, self.seed, step)
        vectors = self.reader.pool(indices.tolist(), list(self.drift.teacher))
        return _of_the_first(self.drift.read(vectors, indices).paired, world)

    def sigma(self, world: World) -> float:
        """The standard deviation of readings of the student as it is now; takes a pass over the whole probe."""
        batch = self.thermostat.config.batch
        layers = list(self.drift.teacher)
        parts = [
            self.reader.pool(range(first, min(first + batch, len(self.reader))), layers)
            for first in range(0, len(self.reader), batch)
        ]
        student = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
        return _of_the_first(self.drift.sigma(batch, _NOISE_DRAWS, self.seed, student), world)


class Protection:
    """An installed method with its gains.

    Attributes:
        gains: those in force; None for a method without any. Those are logged that the method is turned by.
        thermostat: the controller's state; stays as it began where there is none.
    """

    def __init__(
        self, surgery: Surgery, gains: Gains | None, regulation: Regulation | None, logged: Sequence[str] = ()
    ) -> None:
        self._surgery = surgery
        self._logged = tuple(logged)
        self._regulation = regulation
        self.thermostat = ThermostatState() if regulation is None else regulation.thermostat.begin()
        self.gains = gains if regulation is None else regulation.thermostat.gains(self.thermostat)
        if self.gains is not None:
            surgery.set_gains(self.gains)

    def penalty(self, step: int) -> Tensor | None:
        """What the loss of optimizer step `step` gains, a scalar in the graph of the weights; None for nothing.

        The same on every worker, and a function of weights and step alone.
        """
        return self._surgery.penalty(step)

    def around(self) -> AbstractContextManager[None]:
        """Goes around the optimizer's step."""
        return self._surgery.around()

    def regulate(self, step: int, world: World) -> dict[str, float]:
        """After optimizer step `step`: where a reading is due, takes it and sets the gains. What is to be logged.

        Raises:
            ValueError: the reading is not a number.
        """
        regulation = self._regulation
        if regulation is None or not regulation.thermostat.due(step):
            return {}
        d = regulation.read(step, world)
        sigma = regulation.sigma(world) if regulation.thermostat.ends_calibration(self.thermostat) else None
        self.thermostat, self.gains = regulation.thermostat.step(self.thermostat, d, sigma)
        self._surgery.set_gains(self.gains)
        return {"probe/d": d, "gain/strength": self.thermostat.strength, **self._gain_metrics()}

    def readings(self) -> dict[str, float]:
        """Gains, and what the surgery did since the last look."""
        return {**self._surgery.readings(), **self._gain_metrics()}

    def resume(self, values: dict[str, Any]) -> None:
        """Goes on from `thermostat.to_dict()` of an earlier run."""
        if self._regulation is not None:
            self.thermostat = ThermostatState.from_dict(values)
            self.gains = self._regulation.thermostat.gains(self.thermostat)
            self._surgery.set_gains(self.gains)

    def _gain_metrics(self) -> dict[str, float]:
        gains = self.gains
        if gains is None:
            return {}
        values = {"beta": gains.beta, "gamma": gains.gamma, "lambda": gains.lam, "kappa": gains.kappa}
        return {f"gain/{name}": values[name] for name in self._logged}


def _of_the_first(value: float, world: World) -> float:
    """The first worker's value, for every worker."""
    shared = torch.tensor(value, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.broadcast(shared, 0)
    return float(shared)
