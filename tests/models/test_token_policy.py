"""Policies that write tokens or chains: trained, saved, moved, played; they learn what memory must say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.models.action_tokens import FastTokensConfig
from ipvla.models.action_tokens.fast import FastTokens
from ipvla.models.backbones import TinyConfig
from ipvla.models.heads import HeadConfig, RegressionConfig, ReverseChainConfig, TokensConfig
from ipvla.models.memory import (
    GRUMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    MemoryConfig,
    NoMemoryConfig,
)
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.tracking import Sinks
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ipvla.types import Observation

Make = Callable[..., ExperimentConfig]
TINY = TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8, layers=2)
GOLDEN = Path(__file__).with_name("action_tokens") / "golden"
MEMORIES = [NoMemoryConfig(), GRUMemoryConfig(8), LatentMemoryConfig(2), KVMemoryConfig(2)]


@pytest.fixture
def make(make_experiment: Make) -> Callable[..., ExperimentConfig]:
    def configured(head: HeadConfig, memory: MemoryConfig, steps: int = 2) -> ExperimentConfig:
        return make_experiment(
            model=IPVLAConfig(backbone=TINY, memory=memory, head=head, chunk=2),
            training=TrainingConfig(steps=steps, precision="fp32"),
        )

    return configured


def trained(config: ExperimentConfig) -> Experiment:
    experiment = config.build(World())
    train(
        experiment.state, experiment.lanes, config.training, config.optimizer, World(), Sinks(), save=lambda: None
    )
    experiment.policy.model.eval()
    return experiment


def observations(experiment: Experiment, t: int, episodes: range = range(3)) -> list[Observation]:
    dataset = experiment.lanes._dataset
    seen = [dataset.observation(episode, t, ("agentview",)) for episode in episodes]
    return [replace(one, episode=f"suite/cue/{i}/7") for i, one in enumerate(seen)]


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: type(memory).__name__)
@pytest.mark.parametrize(
    "head",
    [
        TokensConfig(),
        TokensConfig(decoding="parallel"),
        TokensConfig(FastTokensConfig(GOLDEN / "fast_published"), temperature=0.5),
        ReverseChainConfig(hidden=16, heads=2, ffn=16),
        ReverseChainConfig(hidden=16, heads=2, ffn=16, poses="absolute"),
    ],
    ids=["bins", "bins in parallel", "fast", "chain of motions", "chain of poses"],
)
def test_it_trains_is_moved_and_acts_as_before(
    head: HeadConfig, memory: MemoryConfig, make: Make, tmp_path: Path
) -> None:
    policy = trained(config := make(head, memory)).policy
    experiment = config.build(World())
    policy.save(tmp_path / "policy")
    shutil.move(tmp_path / "policy", tmp_path / "elsewhere")
    loaded = Policy.load(tmp_path / "elsewhere")
    ours, theirs = policy.initial_memory(3), loaded.initial_memory(3)
    for t in (0, 2, 4):
        chunk, ours = policy.act(observations(experiment, t), ours)
        again, theirs = loaded.act(observations(experiment, t), theirs)
        np.testing.assert_array_equal(chunk, again)
        assert chunk.shape == (3, 2, 7)
    alone = policy.initial_memory(1)
    for t in (0, 2, 4):
        single, alone = policy.act(observations(experiment, t)[1:2], alone)
    np.testing.assert_allclose(single[0], chunk[1], atol=1e-6)


def test_a_policy_takes_its_tokenizer_with_it(make: Make, tmp_path: Path) -> None:
    FastTokens.load(GOLDEN / "fast_published").save(tmp_path / "fitted")
    config = make(TokensConfig(FastTokensConfig(tmp_path / "fitted")), NoMemoryConfig())
    policy = config.build(World()).policy
    policy.save(tmp_path / "policy")
    shutil.rmtree(tmp_path / "fitted")
    head = Policy.load(tmp_path / "policy").config.head
    assert isinstance(head, TokensConfig)
    assert head.tokenizer == FastTokensConfig(tmp_path / "policy" / "action_tokenizer")


def test_other_heads_find_no_language_model_and_compute_as_before(make: Make) -> None:
    config = make(TokensConfig(), GRUMemoryConfig(8))
    experiment = replace(config, model=replace(config.model, head=RegressionConfig(16))).build(World())
    model, seen = experiment.policy.model, list[object]()
    inputs = experiment.policy.transforms.inputs(observations(experiment, 0))
    handle = model.backbone.register_forward_hook(lambda module, args, output: seen.append(output.features))
    model.act(inputs, model.initial_memory(3), torch.zeros(3, dtype=torch.long))
    handle.remove()
    assert [(f.layers, f.language) for f in seen] == [(None, None)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "head",
    [TokensConfig(), TokensConfig(decoding="parallel"), ReverseChainConfig(hidden=32, ffn=32, layers=1)],
    ids=["bins", "bins in parallel", "chain of motions"],
)
def test_it_does_what_only_the_memory_knows(head: HeadConfig, make: Make) -> None:
    """Bright or dark was shown in the first two frames alone; every action of the episode says which."""
    experiment = trained(make(head, GRUMemoryConfig(16), steps=120))
    policy, episodes = experiment.policy, range(24)
    memory = policy.initial_memory(24)
    for t in (0, 2, 4, 6, 8):
        chunk, memory = policy.act(observations(experiment, t, episodes), memory)
    expected = np.array([experiment.lanes._dataset.episode(episode).action[0, 0] for episode in episodes])
    assert (np.sign(chunk[:, 0, 0]) == np.sign(expected)).mean() > 0.9
    other = {name: value.flip(0) for name, value in memory.items()}
    swapped, _ = policy.act(observations(experiment, 10, episodes), other)
    assert (np.sign(swapped[:, 0, 0]) == np.sign(expected[::-1])).mean() > 0.9, "it acts on another's memory"
