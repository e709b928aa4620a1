"""Trainings side by side, each a child process: a few at a time, none twice, none left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import draccus
import psutil
import pytest
from rich.console import Console

from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.policy import CheckpointError
from ipvla.tracking import read_jsonl
from ipvla.training.loop import TrainingConfig
from ray_jobs.running.side_by_side import train_side_by_side

Make = Callable[..., ExperimentConfig]
SHORT = TrainingConfig(steps=4, precision="fp32", log_every=2, checkpoint_every=4)
LONG = TrainingConfig(steps=3000, precision="fp32", log_every=2, checkpoint_every=1000)


def arguments(directory: Path, config: ExperimentConfig) -> list[str]:
    """The command line that asks for `config`."""
    path = directory / f"{config.name}.yaml"
    path.write_text(json.dumps(draccus.encode(config)))  # JSON is YAML
    return ["--config_path", str(path)]


def trainings() -> list[psutil.Process]:
    """The children of this process that train."""
    children = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in children if "ray_jobs.train" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_runs_wait_for_their_turn_and_a_finished_one_is_not_run_again(
    make_experiment: Make, tmp_path: Path
) -> None:
    configs = {name: make_experiment(name=name, training=SHORT) for name in ("one", "two", "three")}
    runs = {name: arguments(tmp_path, config) for name, config in configs.items()}
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

    seen.clear()
    assert train_side_by_side(runs, Console(quiet=True)) == summaries
    done.set()
    watcher.join()
    assert not any(seen)

    other = make_experiment(name="one", training=TrainingConfig(steps=5, precision="fp32"))
    with pytest.raises(CheckpointError, match="other settings"):
        train_side_by_side({"one": arguments(tmp_path, other)}, Console(quiet=True))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_run_names_its_log_and_ends_the_others(make_experiment: Make, tmp_path: Path) -> None:
    sound = make_experiment(name="sound", training=LONG)
    broken = make_experiment(name="broken", data=DataConfig(dataset="nothing"))
    runs = {config.name: arguments(tmp_path, config) for config in (sound, broken)}
    with pytest.raises(RuntimeError, match=r"training broken failed; see .*broken/log\.txt"):
        train_side_by_side(runs, Console(quiet=True))
    assert "nothing" in (broken.run_directory / "log.txt").read_text()
    assert trainings() == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_after_ctrl_c_no_child_stays_and_the_next_start_goes_on(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment(name="long", training=TrainingConfig(24, "fp32", log_every=2, checkpoint_every=8))
    runs = {"long": arguments(tmp_path, config)}

    def interrupt() -> None:
        while not list(config.run_directory.glob("trainer/step_*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_side_by_side(runs, Console(quiet=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainings() == []
    assert train_side_by_side(runs, Console(quiet=True))["long"].steps == 24
    logged = [line["step"] for line in read_jsonl(config.run_directory / "metrics.jsonl")]
    assert logged == list(range(2, 25, 2)), "nothing is trained twice and kept twice"


def test_what_cannot_run_side_by_side_is_refused(make_experiment: Make, tmp_path: Path) -> None:
    run = arguments(tmp_path, make_experiment(name="same"))
    with pytest.raises(ValueError, match="another --name"):
        train_side_by_side({"a": run, "b": run}, Console(quiet=True))
    with pytest.raises(ValueError, match="at_once is 0"):
        train_side_by_side({"a": run}, Console(quiet=True), at_once=0)
