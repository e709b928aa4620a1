"""`start_from`: a run begins with another policy's weights and normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.rlds import write_rlds
from ipvla.data.source import DatasetError
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.memory import (
    BankMemoryConfig,
    GRUMemoryConfig,
    LatentMemoryConfig,
    LSTMMemoryConfig,
    MemoryConfig,
    NoMemoryConfig,
    PromptMemoryConfig,
    WindowMemoryConfig,
)
from ipvla.models.vla import IPVLA
from ipvla.policy import CheckpointError, Policy
from ipvla.training.parallel import World
from tests.synthetic import SIZE, cue_episode
from tests.training.test_loop import run

Make = Callable[..., ExperimentConfig]


@pytest.fixture
def start(make_experiment: Make, tmp_path: Path) -> tuple[ExperimentConfig, IPVLA, Path]:
    """A policy whose every weight has moved since it was drawn."""
    config = make_experiment(seed=5)
    policy = config.build(World()).policy
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.save(tmp_path / "start")
    return config, policy.model, tmp_path / "start"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def with_memory(config: ExperimentConfig, memory: MemoryConfig) -> ExperimentConfig:
    return replace(config, model=replace(config.model, memory=memory))


def test_backbone_and_head_are_the_other_policys(start: tuple[ExperimentConfig, IPVLA, Path]) -> None:
    config, theirs, directory = start
    ours = replace(config, seed=7, start_from=directory).build(World()).policy.model
    assert same(ours, theirs), "the memory too, being of the same mechanism and sizes"
    fresh = replace(config, seed=7).build(World()).policy.model
    assert not same(fresh.backbone, theirs.backbone)


@pytest.mark.parametrize(
    "memory", [NoMemoryConfig(), GRUMemoryConfig(hidden=9), PromptMemoryConfig(plan_tokens=12)]
)
def test_another_memory_begins_afresh(start: tuple[ExperimentConfig, IPVLA, Path], memory: MemoryConfig) -> None:
    config, theirs, directory = start
    ours = with_memory(replace(config, start_from=directory), memory).build(World()).policy.model
    assert same(ours.backbone, theirs.backbone)
    assert same(ours.head, theirs.head)
    fresh = with_memory(config, memory).build(World()).policy.model.memory
    fresh.close()
    assert same(ours.memory, fresh), "as without a start, but closed"


@pytest.mark.parametrize(
    "memory", [GRUMemoryConfig(hidden=9), BankMemoryConfig(length=4), WindowMemoryConfig(), LSTMMemoryConfig()]
)
def test_a_memory_that_is_added_changes_no_bit_before_it_is_trained(
    make_experiment: Make, tmp_path: Path, memory: MemoryConfig
) -> None:
    config = with_memory(make_experiment(seed=5), NoMemoryConfig())
    start = config.build(World()).policy
    start.save(tmp_path / "start")
    ours = with_memory(replace(config, seed=7, start_from=tmp_path / "start"), memory).build(World()).policy
    states = ours.initial_memory(1), start.initial_memory(1)
    dataset = config.open_dataset()
    for t in range(3):
        seen = [dataset.observation(0, t, config.data.cameras)]
        chunk, remembered = ours.act(seen, states[0])
        theirs, nothing = start.act(seen, states[1])
        states = remembered, nothing
        np.testing.assert_array_equal(chunk, theirs)


def test_a_memory_that_cannot_begin_closed_is_named(
    make_experiment: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_memory(make_experiment(seed=5), NoMemoryConfig())
    config.build(World()).policy.save(tmp_path / "start")
    with_memory(replace(config, start_from=tmp_path / "start"), LatentMemoryConfig()).build(World())
    assert "this memory cannot begin closed" in caplog.text


def test_adapters_are_put_on_the_started_weights(start: tuple[ExperimentConfig, IPVLA, Path]) -> None:
    config, theirs, directory = start
    adapted = replace(config.model, lora=LoRAConfig(rank=2, modules=("q_proj",)))
    ours = replace(config, start_from=directory, model=adapted).build(World()).policy.model
    assert same(ours.backbone.vlm.unload(), theirs.backbone.vlm)


def test_adapters_can_be_all_that_is_trained(start: tuple[ExperimentConfig, IPVLA, Path]) -> None:
    config, _, directory = start
    adapted = replace(config.model, lora=LoRAConfig(rank=2, modules=("q_proj",), freeze_rest=True))
    ours = replace(config, start_from=directory, model=adapted).build(World()).policy.model
    assert all("lora_" in name for name, parameter in ours.named_parameters() if parameter.requires_grad)
    free = replace(config, start_from=directory, model=replace(adapted, lora=LoRAConfig(rank=2)))
    assert any(parameter.requires_grad for parameter in free.build(World()).policy.model.head.parameters())


def test_units_stay_those_of_the_start(start: tuple[ExperimentConfig, IPVLA, Path], storage_root: Path) -> None:
    """What the weights were trained on is not renormalised by new data."""
    config, _, directory = start
    episodes = [cue_episode(seed) for seed in range(4)]
    for episode in episodes:
        episode.action[:, 0] *= 0.1
    if not (storage_root / "datasets" / "faint").exists():
        write_rlds(storage_root / "datasets", "faint", episodes, SIZE)
    faint = replace(config, data=DataConfig(dataset="faint", image_size=SIZE))
    started = replace(faint, start_from=directory).build(World()).policy.transforms.statistics
    assert started.to_dict() == config.build(World()).policy.transforms.statistics.to_dict()
    assert started.to_dict() != faint.build(World()).policy.transforms.statistics.to_dict()


def test_other_sizes_and_missing_policies_are_refused(start: tuple[ExperimentConfig, IPVLA, Path]) -> None:
    config, _, directory = start
    wider = replace(config.model, backbone=TinyConfig(width=64, heads=2, mlp=32, trunk_channels=8))
    with pytest.raises(ValueError, match=r"start_from: its backbone differs in \d+ tensors"):
        replace(config, model=wider, start_from=directory).build(World())
    with pytest.raises(CheckpointError, match="no policy in"):
        replace(config, start_from=directory / "nothing").build(World())


def test_a_dataset_without_plans_cannot_train_the_prompt_memory(make_experiment: Make, storage_root: Path) -> None:
    episodes = [replace(cue_episode(seed), reasoning=()) for seed in range(4)]
    write_rlds(storage_root / "datasets", "unspoken", episodes, SIZE)
    config = make_experiment(data=DataConfig(dataset="unspoken", image_size=SIZE))
    with pytest.raises(DatasetError, match="no plans"):
        with_memory(config, PromptMemoryConfig(plan_tokens=12)).build(World())


def test_the_adapters_of_an_earlier_fine_tuning_are_merged(
    start: tuple[ExperimentConfig, IPVLA, Path], tmp_path: Path
) -> None:
    config, _, directory = start
    lora = replace(config, start_from=directory, model=replace(config.model, lora=LoRAConfig(rank=2)))
    first = lora.build(World()).policy
    with torch.no_grad():
        for name, parameter in first.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    first.save(tmp_path / "first")
    second = replace(lora, start_from=tmp_path / "first").build(World())
    batch = next(second.lanes.batches(second.state.position))[1]
    memory = first.initial_memory(config.lanes.lanes)
    losses = [float(p.model.eval().loss(batch, memory)[0]) for p in (first, first.merged(), second.policy)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4), "three forms of one function"
    plain = replace(config, start_from=directory).build(World()).policy
    assert float(plain.model.eval().loss(batch, memory)[0]) != pytest.approx(losses[0], rel=1e-3)
    assert first.merged().config == plain.config
    assert plain.merged() is plain, "nothing to merge"


def test_a_policy_of_a_mixture_acts_in_the_units_of_the_dataset_that_is_asked_for(
    make_experiment: Make, storage_root: Path, tmp_path: Path
) -> None:
    wide = [replace(e, action=2 * e.action) for e in (cue_episode(seed) for seed in range(40, 46))]
    write_rlds(storage_root / "datasets", "wide", wide, SIZE)
    config = make_experiment()
    mixed = replace(config, data=replace(config.data, mixture={"cue": 1.0, "wide": 1.0}))
    mixed.build(World()).policy.save(tmp_path / "mixed")
    by_key = {key: Policy.load(tmp_path / "mixed", unnorm_key=key) for key in (None, "cue", "wide")}
    spans = {key: policy.transforms.statistics.action.q99 for key, policy in by_key.items()}
    np.testing.assert_array_equal(spans[None], spans["cue"])
    assert spans["wide"][0] > spans["cue"][0]
    with pytest.raises(ValueError, match="'narrow' is not in the mixture; choose among cue, wide"):
        Policy.load(tmp_path / "mixed", unnorm_key="narrow")
    config.build(World()).policy.save(tmp_path / "single")
    with pytest.raises(ValueError, match="was not trained on a mixture"):
        Policy.load(tmp_path / "single", unnorm_key="cue")


def test_a_mixture_of_robots_with_other_states_is_trained_without_them(
    make_experiment: Make, storage_root: Path
) -> None:
    other = [replace(e, state=e.state[:, :3]) for e in (cue_episode(seed) for seed in range(40, 46))]
    write_rlds(storage_root / "datasets", "other", other, SIZE)
    config = make_experiment()
    mixture = {"cue": 1.0, "other": 2.0}
    with pytest.raises(DatasetError, match=r"data\.proprio, \[\] for none"):
        replace(config, data=replace(config.data, mixture=mixture)).build(World())
    experiment = replace(config, data=replace(config.data, mixture=mixture, proprio=())).build(World())
    run(config, experiment)
    assert experiment.state.step == config.training.steps
