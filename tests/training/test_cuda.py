"""On a GPU: what a CPU trains, acts and finds; off is off, a stop costs nothing, and weights can be sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.forgetting import HSWConfig, MethodConfig
from ipvla.models.adapters import LoRAConfig, adapters
from ipvla.models.backbones import PaliGemmaConfig
from ipvla.models.memory import (
    BankMemoryConfig,
    GRUMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    MemoryConfig,
    NoMemoryConfig,
    PromptMemoryConfig,
    WindowMemoryConfig,
)
from ipvla.models.vla import IPVLA
from ipvla.policy import Policy, is_sharded
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.policy_server import PolicyServer
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.parallel import World
from ipvla.types import Observation
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from tests.synthetic import SIZE
from tests.training.fine_tuning import PROBE, SENSITIVE, Log, equal, finish, protected, trained
from tests.training.test_protection import STRONG
from tests.training.test_rivals import RIVALS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

Make = Callable[..., ExperimentConfig]
METHODS: list[MethodConfig | None] = [None, *STRONG, *RIVALS]
MEMORIES: list[MemoryConfig] = [
    NoMemoryConfig(),
    GRUMemoryConfig(hidden=16),
    LatentMemoryConfig(tokens=2),
    BankMemoryConfig(length=4),
    WindowMemoryConfig(),
    KVMemoryConfig(length=12),
    PromptMemoryConfig(plan_tokens=12),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float32 as it is, and the same sums in every run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(False)


def gpu() -> World:
    return World(device=torch.device("cuda"))


def adapters_alone(config: ExperimentConfig) -> ExperimentConfig:
    """AdamW makes whole steps of the rounding that is all of some other weights' gradients."""
    lora = config.model.lora or LoRAConfig()
    return replace(config, model=replace(config.model, lora=replace(lora, freeze_rest=True)))


def trained_on(world: World, config: ExperimentConfig, log: Log | None = None) -> Experiment:
    experiment = config.build(world)
    finish(experiment, config, log, world)
    return experiment


def assert_close(gpu: IPVLA, cpu: IPVLA) -> None:
    """All weights, and what adapters add to them, up to a tenth of one of AdamW's steps: rounding may turn it."""
    tolerance = {"rtol": 1e-2, "atol": 1e-3}
    ours, theirs = (adapters(model.backbone) for model in (gpu, cpu))
    for name, adapter in theirs.items():  # the same sum of other factors is the same: an SVD's signs are free
        added = [x.scale * (x.b @ x.a).cpu() for x in (ours[name], adapter)]
        torch.testing.assert_close(*added, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    expected = cpu.state_dict()
    for key, value in gpu.state_dict().items():
        if "lora_" not in key:
            torch.testing.assert_close(value.cpu(), expected[key], **tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_trains_on_a_gpu_what_it_trains_on_a_cpu(
    tuned: ExperimentConfig, method: MethodConfig | None
) -> None:
    config = adapters_alone(tuned)
    if method is not None:
        config = protected(config, method)
    assert_close(trained_on(gpu(), config).state.model, trained(config).state.model)


def test_the_thermostat_reads_on_a_gpu_what_it_reads_on_a_cpu(tuned: ExperimentConfig) -> None:
    thermostat = replace(SENSITIVE, beta_min=0.5, gamma_min=0.0)
    config = protected(adapters_alone(tuned), HSWConfig(), thermostat=thermostat)
    told = []
    for world in (gpu(), World()):
        log = Log()
        trained_on(world, config, log)
        told.append([line["probe/d"] for _, line in log.lines if "probe/d" in line])
    assert len(told[0]) == len(told[1]) > 3
    np.testing.assert_allclose(told[0], told[1], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_off_is_the_baseline_bit_for_bit(tuned: ExperimentConfig, precision: str) -> None:
    tuned = replace(tuned, training=replace(tuned.training, precision=precision))
    baseline = trained_on(gpu(), tuned)
    off = protected(tuned, HSWConfig(beta=0.0, gamma=0.0), enabled=False)
    assert equal(trained_on(gpu(), off), baseline)
    assert equal(trained_on(gpu(), protected(tuned, HSWConfig())), baseline), "gains of 1"
    assert not equal(trained_on(gpu(), protected(tuned, HSWConfig(beta=0.0, gamma=0.0))), baseline)


def test_a_resumed_run_ends_with_the_same_weights(tuned: ExperimentConfig, tmp_path: Path) -> None:
    tuned = replace(tuned, training=replace(tuned.training, precision="auto"))
    config = protected(tuned, HSWConfig(), thermostat=replace(SENSITIVE, beta_min=0.5, gamma_min=0.0))
    whole = trained_on(gpu(), config)
    first = config.build(gpu())
    finish(first, replace(config, training=replace(config.training, until=3)), world=gpu())
    save_checkpoint(tmp_path / "checkpoint", first.state, first.policy, gpu(), config.identity)
    resumed = config.build(gpu())
    load_checkpoint(tmp_path / "checkpoint", resumed.state, gpu(), config.identity)
    finish(resumed, config, world=gpu())
    assert equal(resumed, whole)


def test_accumulation_and_recomputed_activations_change_nothing(tuned: ExperimentConfig) -> None:
    config = protected(adapters_alone(tuned), HSWConfig(beta=0.5, gamma=0.0))
    kept = replace(config, training=replace(config.training, accumulate=2))
    again = replace(kept, training=replace(kept.training, activation_checkpointing=True))
    assert_close(trained_on(gpu(), again).state.model, trained(kept).state.model)


def test_subspaces_of_a_gpu_are_those_of_a_cpu(tuned: ExperimentConfig, tmp_path: Path) -> None:
    config = SubspacesConfig(storage_root=tmp_path, teacher=tmp_path / "teacher", probe=PROBE)
    config = replace(config, icsm=replace(config.icsm, rank=8, scoring="injection"))
    for name, use_gpu in (("cpu", False), ("gpu", True)):
        read_teacher(replace(config, use_gpu=use_gpu), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "cpu").glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "gpu").glob("*.safetensors"))
    ours, theirs = (load_file(tmp_path / name / "subspaces.safetensors") for name in ("gpu", "cpu"))
    assert ours.keys() == theirs.keys()
    for name, basis in ours.items():
        if name.startswith("U"):  # the projector: directions with equal scores may come in any order
            assert_projectors_close(basis, theirs[name], name)


def assert_projectors_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    ours, theirs = ours.double(), theirs.double()
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-2, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda value: type(value).__name__)
def test_a_policy_acts_on_a_gpu_as_on_a_cpu_with_its_memory_there(
    make_experiment: Make, tmp_path: Path, memory: MemoryConfig
) -> None:
    config = make_experiment()
    config = replace(config, model=replace(config.model, memory=memory))
    config.build(World()).policy.save(tmp_path / "policy")
    policies = [Policy.load(tmp_path / "policy", device) for device in ("cuda", "cpu")]
    servers = [PolicyServer(policy) for policy in policies]
    assert all(value.device.type == "cuda" for value in policies[0].initial_memory(2).values())
    for step in range(4):  # the second episode begins two steps later
        episodes = [name for name, begins in (("a", 0), ("b", 2)) if step >= begins]
        answers = []
        for server in servers:
            requests = [
                server.admit(EpisodeId(name), step - 2 * (name == "b"), seen(step, name, policies[0].execute))
                for name in episodes
            ]
            answers.append(server.forward(requests))
        for ours, theirs in zip(*answers, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def seen(step: int, name: str, execute: int) -> Observation:
    rng = np.random.default_rng([step, len(name), ord(name[0])])
    since = step - 2 * (name == "b")
    images = {"agentview": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)}
    return Observation(images, rng.normal(size=8).astype(np.float32), "press the button", since * execute)


def test_paligemma_is_tuned_in_bfloat16_under_protection(
    make_experiment: Make, paligemma_directory: Path, tuned: ExperimentConfig, tmp_path: Path
) -> None:
    backbone = PaliGemmaConfig(str(paligemma_directory), dtype="bfloat16", max_prompt_tokens=24)
    model = replace(tuned.model, backbone=backbone, lora=None)
    base = make_experiment(model=model)
    base.build(World()).policy.save(tmp_path / "large")
    config = SubspacesConfig(
        storage_root=tmp_path, teacher=tmp_path / "large", probe=PROBE, adapters=None, use_gpu=True, batch=8
    )
    read_teacher(
        replace(config, icsm=replace(config.icsm, rank=4, scoring="fisher")),
        tmp_path / "artifacts" / "icsm_paligemma",
    )
    config = replace(
        tuned,
        start_from=tmp_path / "large",
        model=replace(model, lora=LoRAConfig(rank=4, last_layers=4)),
        training=replace(tuned.training, precision="bf16"),
    )
    log = Log()
    trained_on(gpu(), protected(config, HSWConfig(beta=0.5, gamma=0.0), artifact="icsm_paligemma"), log)
    lines = [line for _, line in log.lines if "train/loss" in line]
    assert all(np.isfinite(line["train/loss"]) for line in lines)
    assert all(line["hsw/norm_after"] < line["hsw/norm_before"] for line in lines)


def shard(rank: int, config: ExperimentConfig, directory: Path) -> None:
    """The one worker of a group with weights sharded over it."""
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("nccl", init_method=f"file://{directory / 'store'}", rank=rank, world_size=1)
    world = AlwaysSharded(device=torch.device("cuda", 0))
    experiment = config.build(world)
    assert all(is_sharded(p) for p in experiment.state.model.parameters())
    finish(experiment, config, None, world)
    save_checkpoint(directory / "checkpoint", experiment.state, experiment.policy, world, config.identity)
    dist.destroy_process_group()


class AlwaysSharded(World):
    """Shards over one worker too, as NCCL takes no two of one GPU."""

    def wrap(self, model, sharding="ddp"):  # type: ignore[no-untyped-def]
        return self._shard(model)


@pytest.mark.slow
def test_weights_sharded_by_nccl_train_what_whole_ones_do(tuned: ExperimentConfig, tmp_path: Path) -> None:
    config = protected(adapters_alone(tuned), HSWConfig(beta=0.5, gamma=0.0))
    config = replace(config, training=replace(config.training, sharding="fsdp"))
    mp.spawn(shard, (config, tmp_path), nprocs=1)  # type: ignore[no-untyped-call]
    policy = Policy.load(tmp_path / "checkpoint" / "policy")
    assert_close(policy.model, trained(config).state.model)
