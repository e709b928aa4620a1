"""Every choice of the model trains through the same experiment and comes back as a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ipvla.experiment import ExperimentConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import PaliGemmaConfig, TinyConfig
from ipvla.models.heads import BinsConfig, RegressionConfig
from ipvla.models.memory import (
    BankMemoryConfig,
    ChainMemoryConfig,
    GRUMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    NoMemoryConfig,
    PromptMemoryConfig,
)
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.tracking import Sinks
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from tests.synthetic import SIZE

CHOICES = {
    "tiny, gru, bins": IPVLAConfig(
        TinyConfig(width=32, heads=2, trunk_channels=8), GRUMemoryConfig(16), BinsConfig(32), chunk=2
    ),
    "tiny, none, l1, adapters down to the trunk": IPVLAConfig(
        TinyConfig(width=32, heads=2, trunk_channels=8),
        NoMemoryConfig(),
        RegressionConfig(32, loss="l1"),
        LoRAConfig(rank=2, last_layers=4, modules=("q_proj",), extra=("trunk.conv1",)),
        chunk=2,
    ),
    "tiny, prompt and bank": IPVLAConfig(
        TinyConfig(width=32, heads=2, trunk_channels=8),
        ChainMemoryConfig([PromptMemoryConfig(plan_tokens=12), BankMemoryConfig(length=3)]),
        chunk=2,
    ),
    **{
        f"paligemma, {name}": IPVLAConfig(
            PaliGemmaConfig("set below", dtype="float32", max_prompt_tokens=24), memory, chunk=2
        )
        for name, memory in {
            "latent": LatentMemoryConfig(tokens=2),
            "kv": KVMemoryConfig(length=3),
            "prompt": PromptMemoryConfig(plan_tokens=64),
        }.items()
    },
    "paligemma, gru, bins, adapters": IPVLAConfig(
        PaliGemmaConfig("set below", dtype="float32", max_prompt_tokens=24),
        GRUMemoryConfig(16),
        BinsConfig(32),
        LoRAConfig(rank=2, modules=("q_proj", "v_proj")),
        chunk=2,
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_it_trains_and_comes_back_as_a_policy(
    name: str,
    make_experiment: Callable[..., ExperimentConfig],
    paligemma_directory: Path,
    tmp_path: Path,
) -> None:
    model = CHOICES[name]
    if isinstance(model.backbone, PaliGemmaConfig):
        backbone = PaliGemmaConfig(str(paligemma_directory), dtype="float32", max_prompt_tokens=24)
        model = IPVLAConfig(backbone, model.memory, model.head, model.lora, model.chunk)
    config = make_experiment(model=model, training=TrainingConfig(steps=2, precision="fp32"))
    experiment = config.build(World())
    before = {name: p.clone() for name, p in experiment.state.model.named_parameters()}
    train(
        experiment.state, experiment.lanes, config.training, config.optimizer, World(), Sinks(), save=lambda: None
    )
    moved = {name for name, p in experiment.state.model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in experiment.state.model.named_parameters() if not p.requires_grad}
    assert moved
    assert not moved & frozen
    assert bool(frozen) == (model.lora is not None)

    experiment.policy.model.eval()
    experiment.policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    seen = [experiment.lanes._dataset.observation(episode, 0, ("agentview",)) for episode in (0, 1)]
    assert seen[0].images["agentview"].shape == (SIZE, SIZE, 3)
    chunk, _ = experiment.policy.act(seen, experiment.policy.initial_memory(2))
    same, _ = loaded.act(seen, loaded.initial_memory(2))
    assert (chunk == same).all()
