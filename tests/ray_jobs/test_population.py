"""Populations: what may move, who goes on from whom, and a real PB2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune

from ipvla.experiment import ExperimentConfig
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.policy import CheckpointError
from ipvla.storage import SOURCE_TREE
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.parallel import World
from ipvla.training.surgery import HSWSurgeryConfig
from ray_jobs.command_line.settings import SettingError, parse
from ray_jobs.population import Member, driver, inherit, require_moving, scheduler
from ray_jobs.train import INHERITED
from ray_jobs.tuning.search_space import Dimension
from ray_jobs.tuning.sweep import SweepConfig
from tests.training.fine_tuning import protected, trained

PRESET = SOURCE_TREE / "ray_jobs" / "experiments" / "forgetting" / "sweep.yaml"


@pytest.mark.parametrize(
    ("dimension", "reason"),
    [
        (Dimension(choices=("a", "b")), r"has choices \['a', 'b'\]; scheduler pb2 moves"),
        (Dimension(1, 5), "has whole numbers from 1 to 5"),
        (Dimension(0.1, 1.0, log=True), "is logarithmic"),
    ],
)
def test_only_ranges_of_real_numbers_move(dimension: Dimension, reason: str) -> None:
    with pytest.raises(SettingError, match=rf"space\.gain {reason}"):
        require_moving({"gain": dimension})
    require_moving({"gain": Dimension(0.0, 1.0)})


def test_the_preset_says_what_cannot_move() -> None:
    flags = ["--config_path", str(PRESET), "--scheduler", "pb2", "--search", "random"]
    with pytest.raises(SettingError, match=r"space.forgetting.method.sites has choices"):
        parse(SweepConfig, flags).require_usable()
    with pytest.raises(SettingError, match="choose search random"):
        parse(SweepConfig, flags[:-2])
    with pytest.raises(SettingError, match="need one number"):
        parse(SweepConfig, [*flags, "--objective", "pareto"])


def test_who_goes_on_from_another_has_its_state_and_gains_of_its_own(tuned: ExperimentConfig) -> None:
    def with_gain(name: str, gamma_min: float) -> ExperimentConfig:
        thermostat = ThermostatConfig(every=2, batch=12, calibration=1, gamma_min=gamma_min)
        return replace(protected(tuned, HSWSurgeryConfig(), thermostat=thermostat), name=name)

    theirs, ours = with_gain("theirs", 0.2), with_gain("ours", 0.6)
    donor, world = trained(theirs), World()
    checkpoint = theirs.run_directory / "trainer" / "step_000006"
    save_checkpoint(checkpoint, donor.state, donor.policy, world, theirs.identity)
    inherit(theirs, 6, ours)
    state = ours.build(world).state
    load_checkpoint(ours.run_directory / INHERITED, state, world, ours.identity)
    assert state.step == 6
    for name, value in donor.state.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name])
    with pytest.raises(CheckpointError, match="forgetting"):
        load_checkpoint(checkpoint, state, world, ours.identity)
    assert json.loads((checkpoint / "training.json").read_text())["identity"] == theirs.identity, "left alone"
    with pytest.raises(CheckpointError, match=r"raise training\.checkpoints_kept"):
        inherit(theirs, 4, with_gain("other", 0.6))


def climb(sample: dict[str, Any]) -> None:
    """A member whose score grows by its gain at each of three looks, from where it goes on."""
    trial, given = str(tune.get_context().get_trial_id()), tune.get_checkpoint()
    member = Member.of(given) if given else Member(trial, 0, sample)
    if member.values != sample:
        member = Member(f"{trial}-{member.step}", member.step, sample)
    for step in range(member.step + 1, 4):
        Member(member.run, step, sample).report({"score": step * sample["gain"]})


@pytest.mark.parametrize("concurrent", [1, 2, 3, 4, 8, 16])
def test_so_many_members_run_at_a_time_and_leave_room_for_their_trainings(concurrent: int) -> None:
    (share,) = driver(concurrent).bundles[0].values()
    assert concurrent * (share + 0.001) <= 1 < (concurrent + 1) * share


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_worst_goes_on_from_the_best(tmp_path: Path) -> None:
    space = {"gain": Dimension(0.0, 1.0)}
    results = tune.Tuner(
        tune.with_resources(climb, driver(concurrent=3)),
        param_space={"gain": tune.grid_search([0.1, 0.5, 0.9])},
        tune_config=tune.TuneConfig(scheduler=scheduler(space, every=1), reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="tune", verbose=0, stop={"step": 3}),
    ).fit()
    told = [result.metrics for result in results]
    assert all(one is not None and one["step"] == 3 for one in told), "nobody is left behind"
    moved = [result for result in results if result.metrics and "-" in result.metrics["run"]]
    assert moved, "somebody went on from another"
    assert all(result.config is not None and result.config["gain"] != 0.1 for result in moved)
