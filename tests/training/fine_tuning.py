"""Fine-tuning from a teacher whose artifact is there, with and without protection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.probe import ProbeConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.forgetting import MethodConfig
from ipvla.forgetting.fisher import FisherConfig
from ipvla.forgetting.icsm import ICSMConfig
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.tracking import Sinks
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ipvla.training.protection import ForgettingConfig
from ipvla.training.step import OptimizerConfig
from ipvla.types import Episode
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from tests.synthetic import SIZE, cue_episode

Make = Callable[..., ExperimentConfig]
PROBE = ProbeConfig(dataset="cue_probe", records=24)
SENSITIVE = ThermostatConfig(every=1, batch=12, calibration=2, lo_sigma=1e-4)


class Log(Sinks):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(metrics)))


def colourful_episode(seed: int) -> Episode:
    """No two frames alike, or a probe of them would span next to nothing."""
    episode = cue_episode(seed)
    frames = np.random.default_rng(seed).integers(0, 256, episode.images["agentview"].shape, np.uint8)
    return replace(episode, images={"agentview": frames})


@pytest.fixture
def tuned(make_experiment: Make, tmp_path: Path) -> ExperimentConfig:
    """Fine-tuning with adapters, unprotected, from a teacher whose artifact is there."""
    base = make_experiment(seed=5)
    base.build(World()).policy.save(tmp_path / "teacher")
    write_rlds(tmp_path / "probe", "cue_probe", [colourful_episode(seed) for seed in range(100, 108)], SIZE)
    lora = LoRAConfig(rank=4, last_layers=4)
    config = SubspacesConfig(
        storage_root=tmp_path,
        teacher=tmp_path / "teacher",
        probe=PROBE,
        icsm=ICSMConfig(rank=8, scoring="fisher"),
        adapters=lora,
        fisher=FisherConfig(weights="all"),
    )
    read_teacher(config, tmp_path / "artifacts" / "icsm_tiny")
    return replace(
        base,
        storage_root=tmp_path,
        data_root_dir=base.datasets,
        model=replace(base.model, lora=lora),
        start_from=tmp_path / "teacher",
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        training=TrainingConfig(steps=6, precision="fp32", log_every=2, checkpoint_every=100),
    )


def protected(config: ExperimentConfig, method: MethodConfig, **changes: object) -> ExperimentConfig:
    values: dict[str, object] = {"method": method, "probe": PROBE, **changes}
    return replace(config, forgetting=ForgettingConfig(**values))  # type: ignore[arg-type]


def trained(config: ExperimentConfig, sink: Sinks | None = None) -> Experiment:
    experiment = config.build(World())
    finish(experiment, config, sink)
    return experiment


def finish(
    experiment: Experiment, config: ExperimentConfig, sink: Sinks | None = None, world: World | None = None
) -> None:
    state, lanes = experiment.state, experiment.lanes
    train(state, lanes, config.training, config.optimizer, world or World(), sink or Sinks(), save=lambda: None)


def weights(experiment: Experiment) -> dict[str, torch.Tensor]:
    return experiment.state.model.state_dict()


def equal(a: Experiment, b: Experiment) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
