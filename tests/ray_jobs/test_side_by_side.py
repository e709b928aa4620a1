"""Trainings side by side, each a process of the cluster: a few at a time, none twice, none left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest
from rich.console import Console

from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.policy import CheckpointError
from ipvla.tracking import read_jsonl
from ipvla.training.loop import TrainingConfig
from ray_jobs.command_line.cli import TrainingError
from ray_jobs.running.side_by_side import train_side_by_side

Make = Callable[..., ExperimentConfig]
SHORT = TrainingConfig(steps=4, precision="fp32", log_every=2, checkpoint_every=4)
LONG = TrainingConfig(steps=3000, precision="fp32", log_every=2, checkpoint_every=1000)


def trainings() -> list[psutil.Process]:
    """The processes of this session's Ray that train."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def none_is_left() -> bool:
    """Workers end a moment after their training; those that only begin then end after a step."""
    end, quiet = time.monotonic() + 120, 0
    while quiet < 20 and time.monotonic() < end:
        quiet = 0 if trainings() else quiet + 1
        time.sleep(0.1)
    return quiet == 20


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_runs_wait_for_their_turn_and_a_finished_one_is_not_run_again(make_experiment: Make) -> None:
    runs = {name: make_experiment(name=name, training=SHORT) for name in ("one", "two", "three")}
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            seen.append(len(trainings()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    summaries = train_side_by_side(runs, Console(quiet=True))
    assert max(seen) == 2, "the cluster has two CPUs"
    assert [(name, summary.steps) for name, summary in summaries.items()] == [("one", 4), ("two", 4), ("three", 4)]
    assert none_is_left()

    seen.clear()
    assert train_side_by_side(runs, Console(quiet=True)) == summaries
    done.set()
    watcher.join()
    assert not any(seen)

    other = make_experiment(name="one", training=TrainingConfig(steps=5, precision="fp32"))
    with pytest.raises(CheckpointError, match=r"other settings \(training.steps 4, this run has 5"):
        train_side_by_side({"one": other}, Console(quiet=True))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_run_says_why_and_ends_the_others(make_experiment: Make) -> None:
    sound = make_experiment(name="sound", training=LONG)
    broken = make_experiment(name="broken", data=DataConfig(dataset="nothing"))
    with pytest.raises(TrainingError, match=r"training broken failed: .*nothing"):
        train_side_by_side({config.name: config for config in (sound, broken)}, Console(quiet=True))
    assert none_is_left()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_after_ctrl_c_no_training_stays_and_the_next_start_goes_on(make_experiment: Make) -> None:
    config = make_experiment(name="long", training=TrainingConfig(60, "fp32", log_every=2, checkpoint_every=8))

    def interrupt() -> None:
        while not list(config.run_directory.glob("trainer/step_*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_side_by_side({"long": config}, Console(quiet=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert none_is_left()
    assert train_side_by_side({"long": config}, Console(quiet=True))["long"].steps == 60
    logged = [line["step"] for line in read_jsonl(config.run_directory / "metrics.jsonl")]
    assert logged == list(range(2, 61, 2)), "nothing is trained twice and kept twice"


def test_what_cannot_run_side_by_side_is_refused(make_experiment: Make) -> None:
    run = make_experiment(name="same")
    with pytest.raises(ValueError, match="another --name"):
        train_side_by_side({"a": run, "b": run}, Console(quiet=True))
    with pytest.raises(ValueError, match="at_once is 0"):
        train_side_by_side({"a": run}, Console(quiet=True), at_once=0)
