"""A run always comes back: from its newest whole checkpoint, whatever happened to the others."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.experiment import ExperimentConfig
from ipvla.files import locked
from ipvla.policy import CheckpointError, Policy
from ipvla.storage import StorageError
from ipvla.tracking import Sinks, read_jsonl
from ipvla.training.checkpoint import newest_whole, save_checkpoint
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ray_jobs.command_line.cli import user_error
from ray_jobs.train import checkpointed_policy, pass_over_damaged, summarise, train_policy

Make = Callable[..., ExperimentConfig]
WORLD = World()
FILES = (
    "training.json",
    "optimizer.safetensors",
    "lanes-0.safetensors",
    "policy/policy.json",
    "policy/model.safetensors",
)


def with_checkpoints(config: ExperimentConfig, *steps: int) -> Path:
    """The run's `trainer`, as it is after these steps."""
    experiment, trainer = config.build(WORLD), config.run_directory / "trainer"
    for step in steps:
        experiment.state.step = step
        save_checkpoint(trainer / f"step_{step:06d}", experiment.state, experiment.policy, WORLD, config.identity)
    (trainer / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2')
    return trainer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_the_newest_whole_one_is_found_and_the_others_are_named(
    make_experiment: Make, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None]
) -> None:
    config = make_experiment()
    trainer = with_checkpoints(config, 5, 10)
    damage(trainer / "step_000010" / file)
    with caplog.at_level(logging.WARNING):
        pass_over_damaged(config)
    assert [path.name for path in newest_whole(trainer)[0]] == ["step_000005"]
    assert not (trainer / "checkpoint_manager_snapshot.json").exists()
    assert (trainer / "damaged_step_000010").is_dir(), "nothing of a user's is deleted"
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"passing over {trainer / 'step_000010'}" in said
    assert Path(file).name in said
    assert said.endswith("going on from step_000005")


def test_what_is_gone_is_not_missed_and_what_is_left_is_no_more_than_is_kept(make_experiment: Make) -> None:
    config = make_experiment(training=TrainingConfig(steps=40, checkpoint_every=5, checkpoints_kept=2))
    trainer = with_checkpoints(config, 5, 10, 15, 20)
    shutil.rmtree(trainer / "step_000020")
    (trainer / "step_nonsense").mkdir()
    pass_over_damaged(config)
    assert sorted(path.name for path in trainer.glob("step_*")) == ["step_000010", "step_000015"]


def test_a_policy_that_is_cut_is_made_again(make_experiment: Make, caplog: pytest.LogCaptureFixture) -> None:
    config = make_experiment()
    config.build(WORLD).policy.save(config.run_directory / "policy")
    cut(config.run_directory / "policy" / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        pass_over_damaged(config)
    assert not (config.run_directory / "policy").exists()
    assert "no checkpoint is left: beginning anew" in caplog.text


def test_two_processes_do_not_train_one_run(make_experiment: Make) -> None:
    config = make_experiment()
    with locked(config.run_directory / "lock"), pytest.raises(CheckpointError, match="another process trains"):
        train_policy(config)


def test_a_log_that_a_crash_cut_is_read_as_far_as_it_goes(make_experiment: Make) -> None:
    config = make_experiment()
    path = config.run_directory / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    line = {"step": 5, "train/loss": 1.0, "train/seconds": 2.0, "train/frames_per_s": 3.0}
    path.write_bytes(
        json.dumps(line).encode() + b"\n" + bytes(50) + b"\n{\n[]\n\xff\n" + json.dumps(line).encode()
    )
    assert read_jsonl(path) == [line]
    assert summarise(config).frames_per_s == 3.0
    path.unlink()
    assert summarise(config).steps == config.training.steps


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space is left on the disk for x; free some"),
        (errno.EDQUOT, "this user's share of the disk is used up for x; free some"),
        (errno.EROFS, "the file system has become read-only for x; have it repaired"),
    ],
)
def test_a_disk_that_cannot_be_written_is_told_in_a_line(number: int, said: str) -> None:
    for error in (OSError(number, os.strerror(number), "x"), RuntimeError(f"I/O error: {os.strerror(number)}")):
        told = user_error(error)
        assert isinstance(told, StorageError)
        assert said.partition(" for x")[0] in str(told)
    assert str(told := user_error(OSError(number, os.strerror(number), "x"))).startswith(said), told


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_from_what_is_whole_to_the_same_end(make_experiment: Make) -> None:
    training = TrainingConfig(steps=15, precision="fp32", log_every=5, checkpoint_every=5, checkpoints_kept=3)
    config = make_experiment(training=training)
    train_policy(replace(config, training=replace(training, until=10)))
    trainer = config.run_directory / "trainer"
    cut(trainer / "step_000010" / "optimizer.safetensors")
    cut(trainer / "checkpoint_manager_snapshot.json")
    shutil.copytree(trainer / "step_000005", trainer / "step_000015")
    cut(trainer / "step_000015" / "policy" / "model.safetensors")  # what a full disk left
    again = replace(config, training=replace(training, until=10))
    assert train_policy(again).policy == checkpointed_policy(config, 10), "a remainder is no outcome"
    summary = train_policy(config)
    assert (summary.steps, summary.policy) == (15, config.run_directory / "policy")
    experiment = config.build(WORLD)
    threads = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    train(experiment.state, experiment.lanes, training, config.optimizer, WORLD, Sinks(), save=lambda: None)
    torch.set_num_threads(threads)
    undisturbed = experiment.state.model.state_dict()
    trained = Policy.load(summary.policy).model.state_dict()
    assert all(torch.equal(value, undisturbed[name]) for name, value in trained.items())
    assert [line["step"] for line in read_jsonl(config.run_directory / "metrics.jsonl")] == [5, 10, 15]
