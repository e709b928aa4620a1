"""Weights sharded over two workers of a real process group: what one worker trains, saves and goes on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting import (
    DistillationConfig,
    EWCConfig,
    GPMConfig,
    HSWConfig,
    MethodConfig,
)
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.models.auxiliary_losses import QuestionsConfig
from ipvla.models.memory import KVMemoryConfig, MemoryConfig, PromptMemoryConfig
from ipvla.policy import Policy, is_sharded
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.parallel import World
from tests.synthetic import SIZE, even_episode
from tests.training.fine_tuning import SENSITIVE, Log, finish, protected, trained

LANES = 4
STOP = 2
CASES: dict[str, tuple[MethodConfig, ThermostatConfig | None]] = {
    "idle": (HSWConfig(), None),
    "cut": (HSWConfig(beta=0.5, gamma=0.0, sites="writers"), None),
    "thermostat": (HSWConfig(), replace(SENSITIVE, beta_min=0.5, gamma_min=0.0)),
    "gpm": (GPMConfig(energy=0.5), None),
    "distillation": (DistillationConfig(weight=1.0, batch=8), None),
}
FULL = "all weights"
RESUMED = ("thermostat", "gpm")
CACHED = "cached keys"


def shard(rank: int, configs: dict[str, ExperimentConfig], directory: Path) -> None:
    """One of two workers: trains each case on its half of the lanes, with a checkpoint on the way and after."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=2)
    for name, config in configs.items():
        world, log = World.current(torch.device("cpu")), Log()
        experiment = config.build(world)
        state = experiment.state
        assert all(is_sharded(p) for p in state.model.parameters()), name
        for until in sorted({STOP, config.training.steps}):
            finish(experiment, replace(config, training=replace(config.training, until=until)), log, world)
            save_checkpoint(directory / name / str(until), state, experiment.policy, world, config.identity)
        gains = state.protection and state.protection.gains
        torch.save((told(log), gains), directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def told(log: Log) -> torch.Tensor:
    """Losses of a worker's own lanes and norms of the gradient, means of two steps each."""
    lines = [line for _, line in log.lines if "train/loss" in line]
    return torch.tensor([[line[f"train/{name}"] for name in ("loss", "grad_norm")] for line in lines])


@pytest.mark.slow
def test_two_workers_with_sharded_weights_train_what_one_does(tuned: ExperimentConfig, tmp_path: Path) -> None:
    write_rlds(tmp_path / "even", "even", [even_episode(seed) for seed in range(24)], SIZE)
    assert tuned.model.lora is not None
    # Adapters alone: AdamW makes whole steps of the rounding that is all of some other weights' gradients.
    model = replace(tuned.model, lora=replace(tuned.model.lora, freeze_rest=True))
    tuned = replace(
        tuned,
        model=model,
        training=replace(tuned.training, steps=4),
        data=replace(tuned.data, dataset="even"),
        data_root_dir=tmp_path / "even",
        lanes=replace(tuned.lanes, lanes=LANES, offsets=1),
    )
    ones = {name: protected(tuned, method, thermostat=thermostat) for name, (method, thermostat) in CASES.items()}
    ones["cut"] = replace(
        ones["cut"], training=replace(tuned.training, accumulate=2, activation_checkpointing=True)
    )
    ones[FULL] = replace(tuned, model=replace(tuned.model, lora=None))
    ones[CACHED] = replace(tuned, model=replace(model, memory=KVMemoryConfig(length=4)))
    short = replace(tuned.training, steps=STOP)
    ones |= {name: replace(ones[name], training=short) for name in ("idle", FULL, CACHED)}
    halves = {
        name: replace(
            config,
            lanes=replace(config.lanes, lanes=LANES // 2),
            training=replace(config.training, sharding="fsdp"),
        )
        for name, config in ones.items()
    }
    mp.spawn(shard, (halves, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    for name, config in ones.items():
        log = Log()
        one = trained(config, log)
        (first, gains), (second, others) = (
            torch.load(tmp_path / f"{name}-{r}.pt", weights_only=False) for r in (0, 1)
        )
        torch.testing.assert_close(
            (first + second) / 2, told(log), rtol=1e-3, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert gains == others, f"{name}: one reading for all workers"
        if name == FULL:
            continue
        policy = Policy.load(tmp_path / name / str(config.training.steps) / "policy")
        assert_same(policy.model, one.state.model, name)
        if name in RESUMED:
            resumed = config.build(World())
            load_checkpoint(tmp_path / name / str(STOP), resumed.state, World(), config.identity)
            assert resumed.state.step == STOP
            finish(resumed, config)
            assert_same(resumed.state.model, one.state.model, f"{name}, resumed by one worker")


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module, name: str) -> None:
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=2e-3, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ({"memory": PromptMemoryConfig()}, None, r"model\.memory\.type prompt"),
        ({"questions": QuestionsConfig()}, None, r"model\.questions"),
        ({}, EWCConfig(strength=1.0), r"forgetting\.method\.type ewc"),
    ],
)
def test_what_cannot_be_sharded_is_told_before_anything_starts(
    tuned: ExperimentConfig, model: dict[str, MemoryConfig], method: MethodConfig | None, message: str
) -> None:
    config = protected(tuned, method) if method else tuned
    with pytest.raises(ValueError, match=rf"training\.sharding is fsdp, which {message} cannot .* set it to ddp"):
        replace(
            config,
            model=replace(config.model, **model),  # type: ignore[arg-type]
            training=replace(config.training, sharding="fsdp"),
        )
