"""The service benchmark: fair turns, a bare loop that takes the same step, a sink that is timed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from benchmarks.service import (
    BARE,
    TRAINER,
    TimedMLflowSink,
    Turn,
    TurnsConfig,
    bare_loop,
    conduct,
    trainer_ratio,
)
from ipvla.experiment import ExperimentConfig
from ipvla.policy import Policy
from ipvla.tracking import MLflowSink, RunIdentity, Sinks
from ipvla.training.loop import train
from ipvla.training.parallel import World

Make = Callable[..., ExperimentConfig]


def test_only_one_of_two_has_its_turn(tmp_path: Path) -> None:
    address, at_work, clashes = str(tmp_path / "turns"), threading.Lock(), list[str]()

    def work(turn: Turn, name: str, pause_s: float) -> None:
        while not turn():
            if not at_work.acquire(blocking=False):
                clashes.append(name)
                continue
            time.sleep(pause_s)
            at_work.release()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        threads = [
            threading.Thread(target=work, args=(Turn(address, name, 2), name, pause_s))
            for name, pause_s in ((TRAINER, 0.02), (BARE, 0.01))
        ]
        for thread in threads:
            thread.start()
        seconds = conduct(server, TurnsConfig(turns=4, warmup=1))
        for thread in threads:
            thread.join()
    assert not clashes
    assert seconds.shape == (2, 5, 2)
    worker, bare = np.median(seconds[0], axis=0)
    assert worker > 1.3 * bare, "whose steps take twice as long"


def test_a_ratio_is_of_medians() -> None:
    bare = np.array([100.0, 101.0, 99.0, 100.0, 500.0])
    ratio = trainer_ratio(np.stack([1.02 * bare, bare], 1))
    assert ratio.value == pytest.approx(1.02)
    assert ratio.low <= ratio.value <= ratio.high
    assert trainer_ratio(np.stack([bare, bare], 1)).value == 1


def test_the_bare_loop_takes_the_same_step(make_experiment: Make, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    config = make_experiment()
    config = replace(config, training=replace(config.training, steps=5, precision="fp32"))
    taken = iter((False, False, False, False, True))
    bare_loop(config, lambda: next(taken), tmp_path / "policy")
    experiment = config.build(World())
    train(experiment.state, experiment.lanes, config.training, config.optimizer, World(), Sinks(), lambda: None)
    bare = Policy.load(tmp_path / "policy").model.state_dict()
    assert all(torch.equal(value, bare[name]) for name, value in experiment.state.model.state_dict().items())
    torch.set_num_threads(threads)


def test_a_timed_sink_logs_all_the_same(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    timed = TimedMLflowSink.of(MLflowSink(RunIdentity(uri, "study", "run", "runs/run"), tmp_path / "spool"))
    timed.log({"train/loss": 1.0}, 1)
    timed.close()
    assert timed.calls == 2
    assert timed.seconds > 0
    assert MlflowClient(uri).get_run(timed.run_id).data.metrics == {"train/loss": 1.0}
