"""Two workers of a real process group train what one worker trains, with every kind of protection."""

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
    HSWConfig,
    MethodConfig,
    TwoSidedConfig,
)
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.training.parallel import World
from tests.synthetic import SIZE, even_episode
from tests.training.fine_tuning import SENSITIVE, Log, finish, protected, trained, weights

pytestmark = pytest.mark.slow

LANES = 4
CASES: dict[str, tuple[MethodConfig, ThermostatConfig | None]] = {
    "hsw": (HSWConfig(beta=0.5, gamma=0.0), None),
    "hsw and thermostat": (HSWConfig(), replace(SENSITIVE, beta_min=0.5, gamma_min=0.0)),
    "two-sided": (TwoSidedConfig(lam=10.0, kappa=0.01), None),
    "distillation": (DistillationConfig(weight=1.0, batch=8), None),
}
ACCUMULATED = ("hsw", "distillation")


def work(rank: int, configs: dict[str, ExperimentConfig], directory: Path) -> None:
    """One of two workers: trains each case on its half of the lanes and leaves weights and gains."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=2)
    for name, config in configs.items():
        world, log = World.current(torch.device("cpu")), Log()
        experiment = config.build(world)
        finish(experiment, config, log, world)
        protection = experiment.state.protection
        assert protection is not None
        torch.save((weights(experiment), protection.gains), directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_train_what_one_does(tuned: ExperimentConfig, tmp_path: Path) -> None:
    write_rlds(tmp_path / "even", "even", [even_episode(seed) for seed in range(24)], SIZE)
    assert tuned.model.lora is not None
    # Adapters alone: AdamW makes whole steps of the rounding that is all of some other weights' gradients.
    model = replace(tuned.model, lora=replace(tuned.model.lora, freeze_rest=True))
    data = replace(tuned.data, dataset="even")
    tuned = replace(tuned, model=model, data=data, data_root_dir=tmp_path / "even")
    configs = {}
    for name, (method, thermostat) in CASES.items():
        config = protected(tuned, method, thermostat=thermostat)
        if name in ACCUMULATED:
            config = replace(config, training=replace(config.training, accumulate=2))
        configs[name] = replace(config, lanes=replace(config.lanes, lanes=LANES, offsets=1))
    ones = {name: trained(config) for name, config in configs.items()}
    halves = {n: replace(c, lanes=replace(c.lanes, lanes=LANES // 2)) for n, c in configs.items()}
    mp.spawn(work, (halves, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    for name, one in ones.items():
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1))
        assert all(torch.equal(value, second[0][key]) for key, value in first[0].items()), name
        assert first[1] == second[1], f"{name}: one reading for all workers"
        assert one.state.protection is not None
        if first[1] is not None:
            gains = one.state.protection.gains
            assert gains is not None
            assert vars(first[1]) == pytest.approx(vars(gains), rel=1e-3), name
        for key, value in weights(one).items():
            torch.testing.assert_close(first[0][key], value, rtol=2e-3, atol=2e-5, msg=f"{name}: {key}")
