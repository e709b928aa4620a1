"""Subspaces as a job: from a teacher's directory and a probe to an artifact that training takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.data.probe import ProbeConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting.fisher import DiagonalFisher, FisherConfig
from ipvla.forgetting.icsm import ICSMConfig
from ipvla.forgetting.module_statistics import ModuleStatistics
from ipvla.forgetting.subspaces import Subspaces
from ipvla.models.adapters import LoRAConfig
from ipvla.policy import Policy
from ipvla.training.parallel import World
from ray_jobs import subspaces
from ray_jobs.subspaces import SubspacesConfig, find, read_teacher
from tests.synthetic import SIZE, cue_episode

Make = Callable[..., ExperimentConfig]


@pytest.fixture
def config(make_experiment: Make, tmp_path: Path) -> SubspacesConfig:
    make_experiment().build(World()).policy.save(tmp_path / "teacher")
    write_rlds(tmp_path / "probe", "cue_probe", [cue_episode(seed) for seed in range(100, 108)], SIZE)
    return SubspacesConfig(
        storage_root=tmp_path,
        teacher=tmp_path / "teacher",
        probe=ProbeConfig("cue_probe", records=16),
        icsm=ICSMConfig(rank=2, scoring="fisher"),
        adapters=LoRAConfig(last_layers=4, modules=("o_proj",)),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_same_teacher_and_probe_give_the_same_artifact(config: SubspacesConfig) -> None:
    directory, found = find(config)
    assert directory == config.artifacts / "icsm_tiny"
    loaded = Subspaces.load(directory, backbone="tiny", width=32)
    assert loaded.projector_sha256() == found.projector_sha256()
    assert set(ModuleStatistics.load(directory, {"backbone": "tiny", "width": 32}).modules) == {
        f"layers.{layer}.o_proj" for layer in (2, 3, 4, 5)
    }
    again, same = find(replace(config, name="again"))
    assert again.name == "again"
    for number, subspace in found.layers.items():
        assert torch.equal(subspace.basis, same.layers[number].basis)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--teacher", "nowhere"], f"no policy in {Path.cwd() / 'nowhere'}"),
        (["--probe.dataset", "nothing"], "nothing"),
        (["--probe.records", "9999"], "lower it, or collect more episodes"),
        (["--show_masks", "[99]"], "show_masks: there is no record 99; choose among 0..15"),
        (["--icsm.scoring", "guess"], "injection"),
        (["--icsm.order", "guess"], "icsm.order is 'guess'"),
        (["--fisher.weights", "some"], "fisher.weights is 'some'"),
        (["--fisher.weights", "adapters", "--adapters", "null"], "but adapters is null"),
    ],
)
def test_bad_input_is_one_line(
    config: SubspacesConfig, refused: Callable[..., str], arguments: list[str], told: str
) -> None:
    given = ["--storage_root", str(config.storage_root), "--probe.dataset", "cue_probe", "--probe.records", "16"]
    given += ["--teacher", str(config.teacher), *arguments]
    assert told in refused(SubspacesConfig, subspaces.main, *given)


def test_fisher_information_is_of_the_weights_that_were_asked_for(config: SubspacesConfig, tmp_path: Path) -> None:
    adapters = LoRAConfig(last_layers=4, modules=("o_proj",), extra=("trunk.conv1",))
    few = replace(config, adapters=adapters, fisher=FisherConfig())
    read_teacher(few, tmp_path / "few")
    expected = {f"backbone.vlm.layers.{layer}.o_proj.weight" for layer in (2, 3, 4, 5)}
    assert set(DiagonalFisher.load(tmp_path / "few", {}).weights) == expected | {"backbone.vlm.trunk.conv1.weight"}
    read_teacher(replace(few, fisher=FisherConfig(weights="all")), tmp_path / "all")
    assert config.teacher is not None
    named = dict(Policy.load(config.teacher).model.named_parameters())
    found = DiagonalFisher.load(tmp_path / "all", {"backbone": "tiny"}).weights
    assert {name: f.shape for name, f in found.items()} == {name: p.shape for name, p in named.items()}


def test_the_masks_are_shown(config: SubspacesConfig, capfd: pytest.CaptureFixture[str]) -> None:
    subspaces.main(replace(config, show_masks=(0, 3)))
    assert capfd.readouterr().out.splitlines() == [
        "0: 'press the button' -> press | the | button",
        "3: 'press the button' -> press | the | button",
    ]
