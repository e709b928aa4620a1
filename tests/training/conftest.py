"""A teacher, its probe and its artifact, and an experiment that fine-tunes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting.fisher import FisherConfig
from ipvla.forgetting.icsm import ICSMConfig
from ipvla.models.lora import LoRAConfig
from ipvla.training.loop import TrainingConfig
from ipvla.training.optimizer import OptimizerConfig
from ipvla.training.parallel import World
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from tests.synthetic import SIZE
from tests.training.fine_tuning import PROBE, colourful_episode

Make = Callable[..., ExperimentConfig]


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
