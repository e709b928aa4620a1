"""Trainings side by side: each a process of the Ray cluster, as a sweep's trials are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console

from ipvla.experiment import ExperimentConfig
from ray_jobs.command_line.cli import Terminated, user_error
from ray_jobs.display.training import TrainingDisplay
from ray_jobs.running.cluster import supplied
from ray_jobs.running.training_failure import TrainingError
from ray_jobs.train import TrainSummary, ask_to_stop, demand, forget_earlier_starts, summarise, train_policy

_POLL_S = 0.5
_END_S = 20.0
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


def _train_here(config: ExperimentConfig) -> None:
    """One training. A process that dies is replaced, and its training goes on from the last checkpoint."""
    try:
        train_policy(config)
    except Terminated as stopped:
        raise RuntimeError("it was asked to stop") from stopped


def _train(waiting: Sequence[str], runs: Mapping[str, ExperimentConfig], console: Console, at_once: int) -> None:
    running: dict[Any, str] = {}
    left = list(waiting)
    train_there = ray.remote(num_cpus=0, max_retries=2)(_train_here)
    with _ended(running, runs), TrainingDisplay(lambda: {n: runs[n] for n in list(running.values())}, console):
        while left or running:
            while left and len(running) < at_once:
                name = left.pop(0)
                forget_earlier_starts(runs[name])
                running[train_there.remote(runs[name])] = name
            for done in ray.wait(list(running), timeout=_POLL_S)[0]:
                name = running.pop(done)
                try:
                    ray.get(done)
                except Exception as error:
                    expected = user_error(error)
                    if expected is not None:
                        raise TrainingError(f"training {name} failed: {expected}") from error
                    raise RuntimeError(f"training {name} failed; start it again to go on") from error
                if not console.is_terminal:  # where no bars are shown
                    _logger.info("trained %s; %d runs are left", name, len(left) + len(running))


@contextmanager
def _ended(running: Mapping[Any, str], runs: Mapping[str, ExperimentConfig]) -> Iterator[None]:
    """No training runs after this: those that have begun end after their next step, others at once."""
    try:
        yield
    finally:
        try:
            ending = [training for training, name in running.items() if ask_to_stop(runs[name])]
            for training in set(running) - set(ending):
                ray.cancel(training, force=True)
            if ending:
                ray.wait(ending, num_returns=len(ending), timeout=_END_S)
        finally:
            for training in running:
                ray.cancel(training, force=True)
