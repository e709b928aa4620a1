"""An imported OpenVLA is a teacher as any other: its subspaces are read, and fine-tuning is protected by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.data.rlds import write_rlds
from ipvla.forgetting import MethodConfig
from ipvla.forgetting.fisher import FisherConfig
from ipvla.forgetting.hsw import HSWConfig
from ipvla.forgetting.icsm import ICSMConfig
from ipvla.forgetting.moment_methods import InputDecayConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.training.parallel import World
from ipvla.training.protection import ForgettingConfig
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from tests.checkpoints.test_fine_tuning import experiment
from tests.synthetic import SIZE
from tests.training.fine_tuning import PROBE, SENSITIVE, Log, colourful_episode, finish


@pytest.mark.parametrize("method", [HSWConfig(), InputDecayConfig()])
def test_protection(openvla: Path, storage_root: Path, tmp_path: Path, method: MethodConfig) -> None:
    config = experiment(openvla, storage_root, tmp_path, NoMemoryConfig())
    write_rlds(tmp_path / "probe", "cue_probe", [colourful_episode(seed) for seed in range(100, 108)], SIZE)
    subspaces = SubspacesConfig(
        storage_root=tmp_path,
        teacher=tmp_path / "policy",
        probe=PROBE,
        icsm=ICSMConfig(rank=2, scoring="fisher"),
        adapters=config.model.lora,
        fisher=FisherConfig(weights="all"),
    )
    read_teacher(subspaces, tmp_path / "artifacts" / "icsm_tiny")
    config = replace(config, artifact_dir=tmp_path / "artifacts", probe_root_dir=tmp_path / "probe")
    guarded = replace(config, forgetting=ForgettingConfig(method=method, probe=PROBE, thermostat=SENSITIVE))
    built, log = guarded.build(World()), Log()
    before = {name: value.clone() for name, value in built.state.model.state_dict().items()}
    finish(built, guarded, log)
    assert any("drift" in name or "gain" in name for _, line in log.lines for name in line), log.lines[-1]
    moved = {
        name for name, value in built.state.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved
    assert all("lora_" in name for name in moved)
