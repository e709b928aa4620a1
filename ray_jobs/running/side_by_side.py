"""Trainings side by side on one Ray cluster, each waited for in a thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial

from rich.console import Console

from ipvla.experiment import ExperimentConfig
from ray_jobs.command_line.cli import TrainingError, user_error
from ray_jobs.running.cluster import supplied
from ray_jobs.running.display import TrainingDisplay
from ray_jobs.train import (
    TrainSummary,
    ask_to_stop,
    demand,
    forget_earlier_starts,
    in_background,
    summarise,
    train_policy,
)

_POLL_S = 0.5
#: Workers that are only starting end once they have started, which takes a minute on a busy machine.
_END_S = 120.0
_logger = logging.getLogger(__name__)


def train_side_by_side(
    runs: Mapping[str, ExperimentConfig], console: Console, at_once: int | None = None
) -> dict[str, TrainSummary]:
    """Trains every run that is not finished, in their order, a few at a time, and shows how far they are.

    However this is left, by Ctrl-C or by an error, no training stays: each ends after its next step, with a
    checkpoint, and goes on at the next start. Ray must be connected.

    Args:
        runs: by the name to show; each must have a run directory of its own.
        at_once: how many; by default as many as the cluster has room for.

    Raises:
        ValueError: `at_once` is not positive, or two runs share a directory.
        CheckpointError: a finished run was configured otherwise.
        ClusterError: this machine cannot hold one of them.
        TrainingError: a training failed, and would fail again.
        RuntimeError: a training failed.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once is {at_once}; let at least 1 training run at a time")
    runs = {name: config.absolute() for name, config in runs.items()}
    directories = [config.run_directory for config in runs.values()]
    for directory in directories:
        if directories.count(directory) > 1:
            raise ValueError(f"two runs write to {directory}; give each another --name")
    waiting = []
    for name, config in runs.items():
        if (config.run_directory / "policy" / "policy.json").exists():
            train_policy(config)  # refuses one of other settings
        else:
            waiting.append(name)
    if waiting:
        largest = max((demand(runs[name]) for name in waiting), key=lambda one: one.each["CPU"] * one.count)
        with supplied(largest):
            _train(waiting, runs, console, at_once or largest.places() // largest.count or 1)
    return {name: summarise(config) for name, config in runs.items()}


def _train(waiting: Sequence[str], runs: Mapping[str, ExperimentConfig], console: Console, at_once: int) -> None:
    running: dict[str, Future[object]] = {}
    left = list(waiting)
    with _ended(running, runs), TrainingDisplay(lambda: {name: runs[name] for name in list(running)}, console):
        while left or running:
            while left and len(running) < at_once:
                name = left.pop(0)
                forget_earlier_starts(runs[name])
                running[name] = in_background(partial(train_policy, runs[name]), name)
            time.sleep(_POLL_S)
            for name in [name for name, training in running.items() if training.done()]:
                if (error := running.pop(name).exception()) is not None:
                    raise _named(name, error) from error
                if not console.is_terminal:  # where no bars are shown
                    _logger.info("trained %s; %d runs are left", name, len(left) + len(running))


def _named(name: str, error: BaseException) -> Exception:
    """What ended a training, by its name."""
    if (expected := user_error(error)) is not None:
        return TrainingError(f"training {name} failed: {expected}")
    return RuntimeError(f"training {name} failed; start it again to go on")


@contextmanager
def _ended(running: Mapping[str, Future[object]], runs: Mapping[str, ExperimentConfig]) -> Iterator[None]:
    """No training runs after this: those that have begun end after their next step."""
    try:
        yield
    finally:
        end = time.monotonic() + _END_S
        alive = [name for name, training in running.items() if not training.done()]
        if alive:
            _logger.info("ending %s after the next step", " and ".join(alive))
        while alive and time.monotonic() < end:
            for name in alive:
                ask_to_stop(runs[name])  # again: one that starts now forgets what it was asked before
            wait([running[alive[0]]], _POLL_S)
            alive = [name for name in alive if not running[name].done()]
