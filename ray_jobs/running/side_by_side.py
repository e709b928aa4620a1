"""Trainings side by side: `ray_jobs.train` command lines as child processes on one Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ipvla.experiment import ExperimentConfig
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.settings import parse
from ray_jobs.train import TrainSummary, summarise, train_policy, training_lines

_POLL_S = 0.5
_END_S = 20.0
_logger = logging.getLogger(__name__)


def train_side_by_side(
    runs: Mapping[str, Sequence[str]], console: Console, at_once: int | None = None
) -> dict[str, TrainSummary]:
    """Trains every run that is not finished, in their order, a few at a time, and shows how far they are.

    However this is left, by Ctrl-C or by an error, no child stays: each gets SIGINT and goes on at the next start.

    Args:
        runs: name to show -> arguments of `ray_jobs.train`; each must have a run directory of its own.
        at_once: how many; by default as many as the connected cluster has CPUs for.

    Raises:
        ValueError: `at_once` is not positive, or two runs share a directory.
        CheckpointError: a finished run was configured otherwise.
        RuntimeError: a training failed; its log says why.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once is {at_once}; let at least 1 training run at a time")
    experiments = {name: parse(ExperimentConfig, arguments) for name, arguments in runs.items()}
    directories = [experiment.run_directory for experiment in experiments.values()]
    for directory in directories:
        if directories.count(directory) > 1:
            raise ValueError(f"two runs write to {directory}; give each another --name")
    waiting = []
    for name, experiment in experiments.items():
        if (experiment.run_directory / "policy" / "policy.json").exists():
            train_policy(experiment)  # refuses one of other settings
        else:
            waiting.append(name)
    if waiting:
        _train(waiting, experiments, runs, console, at_once or _places([experiments[name] for name in waiting]))
    return {name: summarise(experiment) for name, experiment in experiments.items()}


def _places(experiments: Sequence[ExperimentConfig]) -> int:
    """How many of them the cluster has CPUs for."""
    largest = max(experiment.training.threads * experiment.num_workers for experiment in experiments)
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // largest)


@dataclass(frozen=True)
class _Child:
    """A training under way."""

    process: subprocess.Popen[bytes]
    experiment: ExperimentConfig
    bar: TaskID

    @property
    def log(self) -> Path:
        return self.experiment.run_directory / "log.txt"


def _train(
    waiting: list[str],
    experiments: Mapping[str, ExperimentConfig],
    runs: Mapping[str, Sequence[str]],
    console: Console,
    at_once: int,
) -> None:
    running: dict[str, _Child] = {}
    with ExitStack() as stack:
        progress = stack.enter_context(_progress(console))
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                process = _start(runs[name], experiments[name])
                stack.callback(_end, process)
                total = experiments[name].training.steps
                bar = progress.add_task(f"training {name}", total=total, note="starting")
                running[name] = _Child(process, experiments[name], bar)
            time.sleep(_POLL_S)
            for name, child in list(running.items()):
                code = child.process.poll()
                _show(progress, child)
                if code:
                    raise RuntimeError(f"training {name} failed; see {child.log}, then start again")
                if code == 0:
                    del running[name]
                    if not console.is_terminal:  # where no bars are shown
                        _logger.info("trained %s; %d runs are left", name, len(waiting) + len(running))


def _start(arguments: Sequence[str], experiment: ExperimentConfig) -> subprocess.Popen[bytes]:
    experiment.run_directory.mkdir(parents=True, exist_ok=True)
    with (experiment.run_directory / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.train", *arguments],
            cwd=SOURCE_TREE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        speed_estimate_period=120,
    )


def _show(progress: Progress, child: _Child) -> None:
    if lines := training_lines(child.experiment):
        last = lines[-1]
        note = f"loss {last['train/loss']:.3f}, {last['train/frames_per_s']:.0f} frames/s"
        progress.update(child.bar, completed=last["step"], note=note)
