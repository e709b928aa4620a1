"""Fine-tuning from a teacher whose artifact is there, with and without protection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ipvla.data.probe import ProbeConfig
from ipvla.data.rlds import Episode
from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.tracking import Sinks
from ipvla.training.loop import train
from ipvla.training.parallel import World
from ipvla.training.protection import ForgettingConfig
from ipvla.training.surgery import SurgeryConfig
from tests.synthetic import cue_episode

PROBE = ProbeConfig(dataset="cue_probe", records=24)


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


def protected(config: ExperimentConfig, method: SurgeryConfig, **changes: object) -> ExperimentConfig:
    values: dict[str, object] = {"method": method, "probe": PROBE, **changes}
    return replace(config, forgetting=ForgettingConfig(**values))  # type: ignore[arg-type]


def trained(config: ExperimentConfig, sink: Sinks | None = None) -> Experiment:
    experiment = config.build(World())
    finish(experiment, config, sink)
    return experiment


def finish(experiment: Experiment, config: ExperimentConfig, sink: Sinks | None = None) -> None:
    state, lanes = experiment.state, experiment.lanes
    train(state, lanes, config.training, config.optimizer, World(), sink or Sinks(), save=lambda: None)


def weights(experiment: Experiment) -> dict[str, torch.Tensor]:
    return experiment.state.model.state_dict()


def equal(a: Experiment, b: Experiment) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
