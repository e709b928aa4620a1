"""Protected fine-tuning: off is gone, on is the method, and a stop changes nothing."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipvla.data.source import DatasetError
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting import (
    HSWConfig,
    InputDecayConfig,
    MethodConfig,
    ProjectedUpdateConfig,
    RoutedMomentsConfig,
    TwoSidedConfig,
)
from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.subspaces import Subspaces
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.parallel import World
from ipvla.training.step import training_step
from ray_jobs.subspaces import SubspacesConfig, Teacher, masked_tokens
from tests.training.fine_tuning import PROBE, SENSITIVE, Log, equal, finish, protected, trained, weights

IDLE: list[MethodConfig] = [
    HSWConfig(),
    ProjectedUpdateConfig(),
    RoutedMomentsConfig(),
    TwoSidedConfig(),
    InputDecayConfig(),
]
STRONG: list[MethodConfig] = [
    HSWConfig(beta=0.5, gamma=0.0),
    HSWConfig(beta=0.5, gamma=0.0, sites="writers"),
    ProjectedUpdateConfig(beta=0.5, gamma=0.0),
    RoutedMomentsConfig(beta=0.5, gamma=0.0),
    TwoSidedConfig(lam=10.0, kappa=0.01),
    InputDecayConfig(lam=0.1),
]


def test_off_is_gone(tuned: ExperimentConfig) -> None:
    off = protected(tuned, HSWConfig(beta=0.0, gamma=0.0), enabled=False)
    assert off.identity == tuned.identity, "the baseline's checkpoint is one of the method that is off"
    ours = trained(off)
    assert ours.state.protection is None
    assert equal(ours, trained(tuned))


def test_gains_of_one_change_nothing(tuned: ExperimentConfig) -> None:
    baseline = trained(tuned)
    for method in IDLE:
        assert equal(trained(protected(tuned, method)), baseline), method


@pytest.mark.parametrize("method", STRONG, ids=str)
def test_a_method_changes_what_adapters_learn_and_nothing_else(
    tuned: ExperimentConfig, method: MethodConfig
) -> None:
    log = Log()
    ours = trained(protected(tuned, method), log)
    assert not equal(ours, trained(tuned))
    before = weights(tuned.build(World()))
    for name, value in weights(ours).items():
        if name.startswith("backbone") and "lora_" not in name:
            assert torch.equal(value, before[name]), name
    step, told = log.lines[-1]
    assert step == 6
    gains = asdict(method.gains)
    logged = {name: value for name, value in told.items() if name.startswith("gain/")}
    assert logged == {f"gain/{name.replace('lam', 'lambda')}": gains[name] for name in method.gained}
    if isinstance(method, HSWConfig):
        assert 0 < told["hsw/norm_after"] <= told["hsw/norm_before"]


@pytest.mark.parametrize("sites", ["last4", "writers"])
def test_activation_checkpoints_leave_every_bit_and_every_reading(tuned: ExperimentConfig, sites: str) -> None:
    config = protected(tuned, HSWConfig(beta=0.5, gamma=0.0, sites=sites))
    log, again = Log(), Log()
    whole = trained(config, log)
    training = replace(config.training, activation_checkpointing=True)
    assert equal(trained(replace(config, training=training), again), whole)
    for (_, ours), (_, theirs) in zip(log.lines, again.lines, strict=True):
        assert {n: v for n, v in ours.items() if "hsw" in n} == {n: v for n, v in theirs.items() if "hsw" in n}


def test_the_thermostat_measures_first_and_then_acts(tuned: ExperimentConfig) -> None:
    log = Log()
    trained(protected(tuned, HSWConfig(), thermostat=SENSITIVE), log)
    readings = [(step, line) for step, line in log.lines if "probe/d" in line]
    assert [step for step, _ in readings] == [1, 2, 3, 4, 5, 6]
    assert all(line["gain/gamma"] == line["gain/beta"] == 1 for _, line in readings[:2]), "calibration"
    assert readings[-1][1]["probe/d"] > readings[0][1]["probe/d"] > 0
    assert readings[-1][1]["gain/gamma"] < readings[-1][1]["gain/beta"] < 1


def test_thresholds_stand_above_calibration_by_the_noise_of_the_student_that_ends_it(
    tuned: ExperimentConfig,
) -> None:
    """The last of two readings is taken of the trained student, so the noise can be measured again afterwards."""
    config = replace(tuned, training=replace(tuned.training, steps=2))
    thermostat = replace(SENSITIVE, lo_sigma=5.0)
    log = Log()
    state = trained(protected(config, HSWConfig(), thermostat=thermostat), log).state
    seen = [line["probe/d"] for _, line in log.lines if "probe/d" in line]
    regulation = state.protection._regulation  # type: ignore[union-attr]
    assert regulation is not None
    student = regulation.reader.pool(range(24), list(regulation.drift.teacher))
    sigma = regulation.drift.sigma(12, 200, config.seed, student)
    assert state.protection is not None
    assert state.protection.thermostat.lo == pytest.approx(sum(seen) / 2 + 5 * sigma, rel=1e-4)
    assert 0 < sigma < regulation.drift.sigma(12, 200, config.seed), "below the noise that pairing takes away"


def test_the_recorded_strengths_of_a_run_give_its_weights_again(tuned: ExperimentConfig) -> None:
    log, again = Log(), Log()
    closed = trained(protected(tuned, HSWConfig(), thermostat=SENSITIVE), log)
    strengths = tuple(line["gain/strength"] for _, line in log.lines if "probe/d" in line)
    assert strengths[2] > 0
    replay = replace(SENSITIVE, mode="replay", strengths=strengths[2:])
    assert equal(trained(protected(tuned, HSWConfig(), thermostat=replay), again), closed)
    shuffled = replace(replay, strengths=replay.strengths[::-1])
    assert not equal(trained(protected(tuned, HSWConfig(), thermostat=shuffled)), closed)
    of_log, of_again = ([line for _, line in sink.lines if "probe/d" in line] for sink in (log, again))
    assert of_log == of_again, "its readings are taken and logged as well"


def test_a_student_that_is_still_its_teacher_has_not_drifted(tuned: ExperimentConfig) -> None:
    protection = protected(tuned, HSWConfig(), thermostat=SENSITIVE).build(World()).state.protection
    assert protection is not None
    assert protection.regulate(1, World())["probe/d"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"mode": "pi"}, {"mode": "replay", "strengths": (0.4, 0.2, 0.9)}],
    ids=lambda changes: changes["mode"],
)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(
    tuned: ExperimentConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = protected(tuned, HSWConfig(), thermostat=replace(SENSITIVE, **changes))
    first = config.build(World())
    state = first.state
    with closing(first.lanes.batches(state.position)) as batches:
        while state.step < 3:
            position, batch = next(batches)
            lr = config.optimizer.learning_rate(state.step, config.training.steps)
            training_step(state, [batch], lr, config.optimizer.max_grad_norm, autocast=None)
            state.step += 1
            state.position = first.lanes.after(position)
            assert state.protection is not None
            state.protection.regulate(state.step, World())
    save_checkpoint(tmp_path / "checkpoint", state, first.policy, World(), config.identity)

    resumed = config.build(World())
    load_checkpoint(tmp_path / "checkpoint", resumed.state, World(), config.identity)
    assert resumed.state.protection is not None
    assert state.protection is not None
    assert resumed.state.protection.thermostat == state.protection.thermostat
    assert resumed.state.protection.gains == state.protection.gains != type(state.protection.gains)()
    finish(resumed, config)
    assert equal(resumed, trained(config))


def test_a_gradient_that_is_not_finite_is_refused_before_it_does_harm(tuned: ExperimentConfig) -> None:
    experiment = protected(tuned, HSWConfig(beta=0.5, gamma=0.0)).build(World())
    state = experiment.state
    before = {name: value.clone() for name, value in weights(experiment).items()}
    next(p for p in state.model.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is nan at step 0; lower optimizer\.lr"):
        training_step(state, [experiment.lanes.batch(state.position)], 1e-3, 1.0, autocast=None)
    assert all(torch.equal(value, before[name]) for name, value in weights(experiment).items())


def test_what_does_not_fit_is_refused(tuned: ExperimentConfig, tmp_path: Path) -> None:
    def build(method: MethodConfig, **changes: object) -> None:
        protected(tuned, method, **changes).build(World())

    with pytest.raises(ArtifactError, match=r"nothing/meta\.json cannot be read"):
        build(HSWConfig(), artifact="nothing")
    other = replace(tuned, seed=9).build(World()).policy
    other.save(tmp_path / "other")
    later = replace(protected(tuned, HSWConfig()), start_from=tmp_path / "other")
    with pytest.raises(ArtifactError, match="teacher_sha256"):
        later.build(World())
    replace(later, forgetting=replace(later.forgetting, other_teacher=True)).build(World())
    with pytest.raises(ArtifactError, match="probe_sha256"):
        build(HSWConfig(), probe=replace(PROBE, seed=1), thermostat=SENSITIVE)
    with pytest.raises(ValueError, match="a drift reading of 64 records from a probe of 24"):
        build(HSWConfig(), thermostat=ThermostatConfig(batch=64))
    with pytest.raises(DatasetError, match="asks for 1000 frames of an episode"):
        build(HSWConfig(), probe=replace(PROBE, records=8000), thermostat=SENSITIVE)
    (tmp_path / "artifacts" / "icsm_tiny" / "module_statistics.json").unlink()
    with pytest.raises(ValueError, match="has no module statistics"):
        build(TwoSidedConfig(lam=1.0))


def test_the_artifact_says_what_it_was_made_from(tuned: ExperimentConfig, tmp_path: Path) -> None:
    subspaces = Subspaces.load(tmp_path / "artifacts" / "icsm_tiny", backbone="tiny", width=32)
    assert subspaces.meta["records"] == 24
    assert len(subspaces.meta["teacher_sha256"]) == len(subspaces.meta["probe_sha256"]) == 64
    assert [group.layers for group in subspaces.groups] == [(2, 3), (4, 5)]
    assert tuned.start_from is not None
    config = SubspacesConfig(storage_root=tmp_path, teacher=tuned.start_from, probe=PROBE)
    assert masked_tokens(Teacher.open(config), 0) == ("press the button", ["press", "the", "button"])
