"""What the service adds to training: Ray Train's worker against a bare PyTorch loop, and MLflow's share of it.

    python -m benchmarks.service [--quick true]

The training is that of `studies.forgetting`'s base policy with the seed that is given; its demonstrations are made
where they are missing. The worker and a bare loop, in processes of their own, take the same steps on the same
batches and take turns at it: whatever else slows the machine slows both. A turn is as long as one log interval, so
that what the worker logs to console and file counts; MLflow is measured apart, in a training that nothing
interrupts.

A full run writes `benchmarks/results/service.json`, beside what `python -m tests.endurance --parts "[sweep]"`
wrote of a sweep that is killed and goes on. `--quick` measures in small, in a temporary place; its results mean
nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final, Self

import draccus
import numpy as np
import torch
from rich.console import Console
from torch import nn

from evaluators.forgetting import Estimate, FloatArray
from evaluators.step_costs import rounds_drawn
from ipvla.data.plan import PlanPosition
from ipvla.experiment import ExperimentConfig
from ipvla.files import write_text
from ipvla.policy import Policy
from ipvla.tracking import MLflowSink, Sinks
from ipvla.tracking.mlflow_spool import Record
from ipvla.training.parallel import World
from ray_jobs.command_line.cli import ending_at_sigterm, run
from ray_jobs.command_line.settings import parse
from ray_jobs.running.cluster import connect
from ray_jobs.train import run_sinks, trainer, work
from studies.engine import placed
from studies.forgetting import ForgettingRunner, ForgettingStudy
from studies.record import Figures, PartStudy, Target, measure_parts

#: What MLflow may be asked for at most: the default of `training.log_every`.
_LOG_EVERY: Final = 20
TRAINER, BARE = "trainer", "bare"
_BEGIN_S = 600.0


@dataclass(frozen=True)
class ServiceStudy(PartStudy):
    """What is measured.

    Attributes:
        seed: of the base policy.
        turns: of the worker and of the bare loop, of 20 steps each.
        steps: of the training in which MLflow's share is measured.
    """

    all_parts: ClassVar[tuple[str, ...]] = ("training",)
    seed: int = 100
    turns: int = 40
    steps: int = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "seed")
        self.require_at_least(2, "turns")
        self.require_at_least(1, "steps")

    @property
    def forgetting(self) -> ForgettingStudy:
        """The study whose data and base policy these are: one seed, and no second task."""
        one = {"methods": ("hsw_thermostat",), "seeds": (self.seed + 1,), "tuning_seed": self.seed}
        return ForgettingStudy(quick=self.quick, tune=True, **one, **self.directories)  # type: ignore[arg-type]

    @property
    def training(self) -> ExperimentConfig:
        """The base policy's training, by one worker and with MLflow at the default interval."""
        base = parse(ExperimentConfig, self.forgetting.base_arguments(self.seed))
        training = replace(base.training, precision="fp32", log_every=_LOG_EVERY, steps=self.steps)
        training = replace(training, checkpoint_every=self.steps)
        return replace(base, study="service", num_workers=1, training=training)


@dataclass(frozen=True)
class TurnsConfig:
    """How the two trainings take turns.

    Attributes:
        turns: of each that count.
        warmup: turns of each before them.
        steps: of a turn.
    """

    turns: int = 40
    warmup: int = 2
    steps: int = 20


class Turn:
    """In a training, asked after every step: times what is a turn, and waits until the next one begins."""

    def __init__(self, address: str, name: str, steps: int) -> None:
        self._address, self._name, self._steps = address, name, steps
        self._driver: Connection | None = None
        self._taken = 0

    def __call__(self) -> bool:
        """Whether to end."""
        if self._driver is None:  # the first step, which allocates and compiles, is in no turn
            self._driver = Client(self._address)
            self._driver.send(self._name)
            return self._wait()
        self._taken += 1
        if self._taken % self._steps:
            return False
        self._driver.send((time.perf_counter() - self._wall, time.process_time() - self._cpu))
        return self._wait()

    def _wait(self) -> bool:
        assert self._driver is not None
        go_on: bool = self._driver.recv()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return not go_on


def step_times(config: ExperimentConfig, turns: TurnsConfig) -> tuple[FloatArray, bool]:
    """Runs both; Ray must be connected. `config` is of one worker on a CPU, and has logged nothing yet.

    Returns:
        Milliseconds per step, float64 [2, turns, 2], by wall and by CPU time, of the worker and of the bare loop;
        and whether both ended with the same weights, bit for bit.
    """
    training = replace(config.training, steps=10**6, checkpoint_every=10**6, log_every=turns.steps)
    config = replace(config, training=training)
    with TemporaryDirectory() as place, closing(socket.socket(socket.AF_UNIX)) as server:
        address, bare_policy = f"{place}/turns", Path(place) / "policy"
        server.bind(address)
        server.listen()
        server.settimeout(_BEGIN_S)
        bare = multiprocessing.get_context("spawn").Process(
            target=bare_loop, args=(config, Turn(address, BARE, turns.steps), bare_policy)
        )

        def in_turns(encoded: dict[str, Any]) -> None:
            turn = Turn(address, TRAINER, turns.steps)
            work(draccus.decode(ExperimentConfig, encoded), _without_mlflow, turn)

        with ThreadPoolExecutor(1) as thread:
            fitted = thread.submit(lambda: trainer(config, in_turns).fit())
            bare.start()
            try:
                seconds = conduct(server, turns)
            finally:
                server.close()
                bare.join(_BEGIN_S)
            fitted.result()
        (checkpoint,) = (config.run_directory / "trainer").glob("step_*")
        same = _weights(checkpoint / "policy") == _weights(bare_policy)
    return 1e3 * seconds[:, turns.warmup :] / turns.steps, same


def conduct(server: socket.socket, turns: TurnsConfig) -> FloatArray:
    """Seconds [clock, turn, who]: one after the other, and the other way round in the next turn."""
    trainings: dict[str, Connection] = {}
    while len(trainings) < 2:
        connection, _ = server.accept()
        joined = Connection(connection.detach())
        trainings[joined.recv()] = joined
    told = np.zeros((2, turns.warmup + turns.turns, 2))
    for turn in range(told.shape[1]):
        for name in (TRAINER, BARE) if turn % 2 else (BARE, TRAINER):
            trainings[name].send(True)
            told[:, turn, (TRAINER, BARE).index(name)] = trainings[name].recv()
    for training in trainings.values():
        training.send(False)
    return told


def bare_loop(config: ExperimentConfig, turn: Callable[[], bool], out: Path) -> None:
    """The step as anybody would write it, on the same model and batches, until `turn` ends it."""
    torch.set_num_threads(config.training.threads)
    experiment, optimizing = config.build(World()), config.optimizer
    model, optimizer, memory = experiment.state.model, experiment.state.optimizer, experiment.state.memory
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    model.train()
    with closing(experiment.lanes.batches(PlanPosition())) as batches:
        for step, (_, batch) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = optimizing.learning_rate(step, config.training.steps)
            optimizer.zero_grad(set_to_none=True)
            loss, memory = model(batch, memory)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, optimizing.max_grad_norm)
            optimizer.step()
            memory = {name: tensor.detach() for name, tensor in memory.items()}
            loss.item()
            if turn():
                break
    experiment.policy.save(out)


def trainer_ratio(ms: FloatArray) -> Estimate:
    """Worker over bare loop, of medians of ms [turns, 2]; the interval from turns drawn with replacement."""

    def ratio(ms: FloatArray) -> FloatArray:
        worker, bare = np.moveaxis(np.median(ms, axis=-2), -1, 0)
        return np.stack([worker / bare])

    return rounds_drawn(ratio, ms)[0]


class TimedMLflowSink(MLflowSink):
    """With the seconds that its run has cost: of waiting by the logging thread, of CPU by the sending one."""

    seconds: float
    calls: int

    @classmethod
    def of(cls, sink: MLflowSink) -> Self:
        """`sink` itself, from now on timed."""
        sink.__class__ = cls
        assert isinstance(sink, cls)
        sink.seconds, sink.calls = 0.0, 0
        return sink

    def close(self, status: str = "FINISHED") -> None:
        with self._timed(time.perf_counter):
            super().close(status)

    def _append(self, record: Record) -> None:
        with self._timed(time.perf_counter):
            super()._append(record)
        self.calls += 1

    def _send(self) -> None:
        with self._timed(time.thread_time):
            super()._send()

    @contextmanager
    def _timed(self, clock: Callable[[], float]) -> Iterator[None]:
        began = clock()
        yield
        self.seconds += clock() - began


def mlflow_seconds(config: ExperimentConfig) -> dict[str, float]:
    """Of a whole training as `ray_jobs.train` runs it: what it waited for MLflow, and how long it took.

    `open_s`: to open the sinks, once; `logging_s`: see `TimedMLflowSink`; `training_s`: from the
    opened sinks to their close.
    """
    told = config.run_directory / "mlflow_seconds.json"

    def timed(encoded: dict[str, Any]) -> None:
        opened: dict[str, Any] = {}

        def open_sinks(config: ExperimentConfig, step: int) -> Sinks:
            began = time.perf_counter()
            sinks = run_sinks(config, step).sinks
            opened["began"] = time.perf_counter()
            opened["open_s"] = opened["began"] - began
            opened["mlflow"] = [TimedMLflowSink.of(sink) for sink in sinks if isinstance(sink, MLflowSink)]
            return Sinks(sinks)

        config = draccus.decode(ExperimentConfig, encoded)
        work(config, open_sinks, lambda: False)
        (mlflow,) = opened["mlflow"]
        training_s = time.perf_counter() - opened["began"]
        seconds = {"open_s": opened["open_s"], "logging_s": mlflow.seconds, "training_s": training_s}
        write_text(told, json.dumps(seconds | {"calls": mlflow.calls}))

    trainer(config, timed).fit()
    seconds: dict[str, float] = json.loads(told.read_text())
    return seconds | {"steps": config.training.steps, "log_every": config.training.log_every}


def _without_mlflow(config: ExperimentConfig, step: int) -> Sinks:
    return Sinks(tuple(sink for sink in run_sinks(config, step).sinks if not isinstance(sink, MLflowSink)))


def _weights(policy: Path) -> bytes:
    """All of them, in one order."""
    state = Policy.load(policy).model.state_dict()
    return b"".join(state[name].cpu().numpy().tobytes() for name in sorted(state))


def measure_training(study: ServiceStudy, console: Console) -> Figures:
    """Times of the worker, of the bare loop, and of MLflow; Ray must be connected."""
    turns = TurnsConfig(turns=study.turns)
    ForgettingRunner(study.forgetting, console).collect(study.forgetting.collections)
    with TemporaryDirectory(dir=study.tmp) as place:  # so that every measurement begins anew
        here = replace(study.training, run_root_dir=Path(place))
        ms, same_weights = step_times(replace(here, name="turns"), turns)
        mlflow = mlflow_seconds(replace(here, name="logged"))
    ratio, ratio_cpu = (draccus.encode(trainer_ratio(by_clock)) for by_clock in ms)
    return {
        "step_ms": dict(zip((TRAINER, BARE), np.median(ms[0], axis=0).tolist(), strict=True)),
        "turns": study.turns,
        "steps_of_a_turn": turns.steps,
        "same_weights": same_weights,
        "ratio": ratio,
        "ratio_cpu": ratio_cpu,
        "mlflow": mlflow,
    }


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, of the parts that there are figures of."""
    parts = {"training": _training_targets, "sweep": _sweep_targets}
    return [target for part, of in parts.items() if part in figures for target in of(figures[part])]


def _training_targets(training: Mapping[str, Any]) -> list[Target]:
    ratio, mlflow, same = training["ratio"], training["mlflow"], training["same_weights"]
    turns = (
        f"medians of {training['turns']} turns of {training['steps_of_a_turn']} steps each, with the worker's log "
        f"to console and file; both end with {'the same' if same else 'other'} weights"
    )
    asked = (
        f"{1e3 * mlflow['logging_s']:.0f} ms of {mlflow['training_s']:.0f} s; SQLite, every {mlflow['log_every']} "
        f"steps; to open the run took {mlflow['open_s']:.1f} s more, once"
    )
    value, share = ratio["value"] if same else None, mlflow["logging_s"] / mlflow["training_s"]
    return [
        Target("trainer_ratio", value, 1.03, False, interval=(ratio["low"], ratio["high"]), note=turns),
        Target("mlflow_share", share, 0.01, False, note=asked),
    ]


def _sweep_targets(sweep: Mapping[str, Any]) -> list[Target]:
    ended = sweep["trials"]["finished"] + sweep["trials"]["stopped"]
    both = (
        "both starts of the driver, with the comparison on fresh seeds; base policy and artifact were made before"
    )
    killed = f"of the {sweep['ended_before_the_kill']} that had ended when the driver was killed"
    return [
        Target("sweep_trials", ended, 24, True, note="finished, or stopped early"),
        Target("sweep_wall_s", sweep["seconds"], 3600, False, note=both),
        Target("sweep_repeated_trials", len(sweep["repeated"]), 0, False, note=killed),
    ]


def main(study: ServiceStudy) -> None:
    """Measures, prints, and on a full run records."""
    console = Console()
    if study.quick:
        study = replace(study, turns=4, steps=60)
    with ending_at_sigterm(), placed(study, study.quick) as here, connect(here):
        measure_parts("service", here, lambda _: measure_training(here, console), targets, console, [here.seed])


if __name__ == "__main__":
    run(ServiceStudy, main, __doc__)
