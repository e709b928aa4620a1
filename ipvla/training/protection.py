"""What keeps fine-tuning from forgetting: a method, where it can be at the strength that drift asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipvla.data.probe import ProbeConfig
from ipvla.data.transforms import Transforms
from ipvla.forgetting import HSWConfig, Method, MethodConfig
from ipvla.forgetting.drift import DriftProbe
from ipvla.forgetting.thermostat import Thermostat, ThermostatConfig, ThermostatState
from ipvla.models.vla import IPVLA
from ipvla.training.parallel import World
from ipvla.training.readers import ProbeReader
from ipvla.training.target import PolicyTarget, WholeFactors

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
    method: MethodConfig = field(default_factory=HSWConfig)
    thermostat: ThermostatConfig | None = None
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if self.thermostat is not None and not self.method.gained:
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
        target = PolicyTarget(
            model, backbone, optimizer, transforms, artifacts / self.artifact, teacher, probe, seed
        )
        method = self.method.install(target)
        target.whole_factors.put_back()  # installation may have changed them
        regulation = None
        if self.thermostat is not None and probe is not None:
            drift = DriftProbe.load(
                target.artifact,
                backbone=backbone,
                layers=sorted(target.subspaces.layers),
                probe_sha256=probe.sha256,
            )
            drift.indices(self.thermostat.batch, seed, 0)  # a probe that is too small fails here
            reader = ProbeReader(model, transforms, probe)
            regulation = Regulation(reader, drift, self.thermostat.build(), seed)
        return Protection(self.method, method, regulation, target.whole_factors)


@dataclass(frozen=True)
class Regulation:
    """What a reading takes: the student on the probe, the teacher's vectors, the Thermostat that answers it."""

    reader: ProbeReader
    drift: DriftProbe
    thermostat: Thermostat
    seed: int

    def read(self, step: int, world: World) -> float:
        """The paired drift after `step` steps, of the records drawn for it; every worker gets that of rank 0."""
        indices = self.drift.indices(self.thermostat.config.batch, self.seed, step)
        vectors = self.reader.pool(indices.tolist(), list(self.drift.teacher))
        return world.broadcast_from_rank0(self.drift.read(vectors, indices).paired)

    def sigma(self, world: World) -> float:
        """The standard deviation of readings of the student as it is now; takes a pass over the whole probe."""
        batch = self.thermostat.config.batch
        layers = list(self.drift.teacher)
        parts = [
            self.reader.pool(range(first, min(first + batch, len(self.reader))), layers)
            for first in range(0, len(self.reader), batch)
        ]
        student = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
        return world.broadcast_from_rank0(self.drift.sigma(batch, _NOISE_DRAWS, self.seed, student))


class Protection:
    """An installed method with its gains, which a Thermostat may change.

    Args:
        config: what `method` was installed from.
        regulation: None for constant gains.
        whole_factors: of the adapters that the method corrects.

    Attributes:
        gains: those in force; a method without gains leaves them at their defaults, and logs none.
        thermostat: the controller's state; stays as it began where there is none.
    """

    def __init__(
        self,
        config: MethodConfig,
        method: Method,
        regulation: Regulation | None = None,
        whole_factors: WholeFactors | None = None,
    ) -> None:
        self._config, self._method, self._regulation = config, method, regulation
        self._whole_factors = whole_factors or WholeFactors()
        self.gains = config.gains
        self.thermostat = ThermostatState()
        if regulation is not None:
            self._regulate(regulation, regulation.thermostat.begin())

    def penalty(self, step: int) -> Tensor | None:
        """A scalar in the graph of the weights that is added to the loss of optimizer step `step`; None for none.

        The same on every worker, and a function of weights and step alone.
        """
        return self._method.penalty(step)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Goes around the optimizer's step, which the method then corrects; not if the step raises."""
        self._whole_factors.fetch()
        self._method.before()
        yield
        self._whole_factors.fetch()
        self._method.after()
        self._whole_factors.put_back()

    def regulate(self, step: int, world: World) -> dict[str, float]:
        """After `step` optimizer steps: takes a reading where one is due and sets the gains; the metrics to log.

        Raises:
            ValueError: the reading is not a number.
        """
        regulation = self._regulation
        if regulation is None or not regulation.thermostat.due(step):
            return {}
        d = regulation.read(step, world)
        sigma = regulation.sigma(world) if regulation.thermostat.ends_calibration(self.thermostat) else None
        self._regulate(regulation, regulation.thermostat.step(self.thermostat, d, sigma)[0])
        return {"probe/d": d, "gain/strength": self.thermostat.strength, **self._gain_metrics()}

    def readings(self) -> dict[str, float]:
        """Gains, and what the method did since the last reading, as TYPE/NAME."""
        kind = self._config.get_choice_name(type(self._config))
        readings = {f"{kind}/{name}": value for name, value in self._method.readings().items()}
        return {**readings, **self._gain_metrics()}

    def resume(self, values: dict[str, Any]) -> None:
        """Goes on from `thermostat.to_dict()` of an earlier run."""
        if self._regulation is not None:
            self._regulate(self._regulation, ThermostatState.from_dict(values))

    def _regulate(self, regulation: Regulation, state: ThermostatState) -> None:
        self.thermostat, self.gains = state, regulation.thermostat.gains(state)
        self._method.set_gains(self.gains)

    def _gain_metrics(self) -> dict[str, float]:
        return self.gains.metrics(self._config.gained)
