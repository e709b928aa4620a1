"""Heads that generate, on two workers of a real process group, whole or sharded: the losses are one worker's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.models.heads import (
    BinsConfig,
    FlowConfig,
    HeadConfig,
    LayerwiseConfig,
    ReverseChainConfig,
    TokensConfig,
)
from ipvla.models.heads.quality import QualityConfig
from ipvla.models.heads.routing import RoutingConfig
from ipvla.training.parallel import SHARDINGS, World
from tests.synthetic import SIZE, even_episode
from tests.training.fine_tuning import Log, finish, trained

pytestmark = pytest.mark.slow

HEADS: dict[str, HeadConfig] = {
    "flow": FlowConfig(16, draws=2, quality=QualityConfig(smoothness=0.1)),
    "layerwise": LayerwiseConfig(16, mlp=16, layers=(2, 1), routing=RoutingConfig("sample", hidden=8)),
    "bins": BinsConfig(hidden=16),
    "reverse_chain": ReverseChainConfig(),
    "tokens": TokensConfig(),
    "tokens_parallel": TokensConfig(decoding="parallel"),
}


def work(rank: int, configs: dict[str, ExperimentConfig], directory: Path) -> None:
    """One of two workers: trains each case on its half of the lanes and leaves its losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=2)
    for name, config in configs.items():
        world, log = World.current(torch.device("cpu")), Log()
        finish(config.build(world), config, log, world)
        torch.save(losses(log), directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def losses(log: Log) -> torch.Tensor:
    return torch.tensor([line["train/loss"] for _, line in log.lines if "train/loss" in line])


def test_two_workers_train_what_one_does(make_experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    write_rlds(tmp_path / "even", "even", [even_episode(seed) for seed in range(24)], SIZE)
    plain = make_experiment()
    plain = replace(
        plain,
        data=replace(plain.data, dataset="even"),
        data_root_dir=tmp_path / "even",
        lanes=replace(plain.lanes, lanes=4, offsets=1),
        training=replace(plain.training, steps=3, log_every=1),
    )
    tiny = replace(plain.model.backbone, layers=2)  # type: ignore[type-var, call-arg]
    ones = {
        name: replace(plain, model=replace(plain.model, backbone=tiny, head=head, chunk=3))
        for name, head in HEADS.items()
    }
    halves = {
        f"{name}-{sharding}": replace(
            one, lanes=replace(one.lanes, lanes=2), training=replace(one.training, sharding=sharding)
        )
        for name, one in ones.items()
        for sharding in SHARDINGS
    }
    mp.spawn(work, (halves, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    for name, one in ones.items():
        log = Log()
        trained(one, log)
        assert len(losses(log)) == 3
        for sharding in SHARDINGS:
            both = [torch.load(tmp_path / f"{name}-{sharding}-{rank}.pt") for rank in (0, 1)]
            torch.testing.assert_close(
                sum(both) / 2,
                losses(log),
                rtol=2e-3,
                atol=1e-5,
                msg=lambda m, n=name, s=sharding: f"{n}, {s}: {m}",
            )
