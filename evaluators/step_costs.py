"""What protection costs in training time: a step with gradient surgery, and the Thermostat's readings.

Three runs of one experiment stand side by side in this process: without protection, with the method alone, and
with the method and its Thermostat. A round is one step of each on the same batch, in an order that rotates, and
one reading of the third; so whatever else slows the machine slows all of them. Ratios are of medians over rounds,
with intervals from rounds drawn with replacement.

On a CPU time is this process's CPU time, which leaves out what it waits for other processes; ratios of wall time
are given beside it. On a GPU it is wall time, with the device waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from evaluators.forgetting import Estimate, FloatArray
from evaluators.intervals import percentiles, resampled
from evaluators.step_response import thermostat_of
from ipvla.data.plan import PlanPosition
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting import Gains
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.training.parallel import World
from ipvla.training.precision import autocast_format
from ipvla.training.step import training_step
from ipvla.types import StepBatch

#: By clock, "wall" and "cpu".
Seconds = dict[str, float]
#: Of a round, in this order: a step of each of the three runs, and a reading of the third.
PARTS = ("baseline", "method", "thermostat", "reading")


@dataclass(frozen=True)
class StepCostConfig:
    """How the costs are measured.

    Attributes:
        rounds: that count.
        warmup: rounds before them.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """

    rounds: int = 120
    warmup: int = 5
    draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"rounds": 2, "warmup": 1, "draws": 2, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def step_costs(config: ExperimentConfig, settings: StepCostConfig) -> dict[str, Any]:
    """Measures, with `config.forgetting` as the method and its Thermostat, or a default one.

    Returns:
        JSON values: `clock`, "cpu" or "wall"; by it, medians over `rounds`, in milliseconds, of a step of each run
        (`baseline_ms`, `method_ms`, `thermostat_ms`, with no reading due), of a reading (`reading_ms`, one in
        `every` steps) and of the one that ends calibration (`calibration_ms`, measured once). Estimates of
        `hsw_step_ratio`, method over baseline, and of `thermostat_step_ratio`, (method_ms + reading_ms / every) /
        method_ms; the same by wall time under their names with `_wall`.

    Raises:
        ValueError: the experiment has no method, or one whose gains leave training as it is.
        DatasetError, CheckpointError, ArtifactError: as `ExperimentConfig.build`.
    """
    world = World(device=torch.device("cuda" if config.use_gpu else "cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.training.threads)
    try:
        trainers = {name: Trainer(run, world) for name, run in variants(config).items()}
        every = trainers["thermostat"].thermostat.every
        calibration = trainers["thermostat"].calibrate()
        seconds = play(trainers, settings)
    finally:
        torch.set_num_threads(threads)
    clock = "cpu" if world.device.type == "cpu" else "wall"
    costs: dict[str, Any] = {"clock": clock, "rounds": settings.rounds, "every": every}
    medians = (1e3 * np.median(seconds[clock], axis=0)).tolist()
    costs |= {f"{part}_ms": ms for part, ms in zip(PARTS, medians, strict=True)}
    costs["calibration_ms"] = 1e3 * calibration[clock]
    for of, suffix in ((clock, ""), ("wall", "_wall")):
        hsw, thermostat = (asdict(one) for one in ratios(seconds[of], every, settings))
        costs |= {f"hsw_step_ratio{suffix}": hsw, f"thermostat_step_ratio{suffix}": thermostat}
    return costs


def variants(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """The three runs by name; ValueError if there is no method, or one that leaves training as it is."""
    protection = config.protected_by
    if protection is None:
        raise ValueError("the experiment's forgetting is None or off; give the method whose cost is asked for")
    if protection.method.gained and protection.method.gains == Gains():
        raise ValueError(f"the gains of {protection.method} leave training as it is; lower gamma or beta")
    regulated = replace(protection, thermostat=protection.thermostat or ThermostatConfig())
    return {
        "baseline": replace(config, forgetting=None),
        "method": replace(config, forgetting=replace(protection, thermostat=None)),
        "thermostat": replace(config, forgetting=regulated),
    }


class Trainer:
    """One of the runs, step by step, with what a step and a reading take."""

    def __init__(self, config: ExperimentConfig, world: World) -> None:
        self.config, self.world = config, world
        self.experiment = config.build(world)
        self.experiment.state.trained.train()
        self._autocast = autocast_format(config.training.precision, world.device)
        self._readings = 0

    @property
    def thermostat(self) -> ThermostatConfig:
        return thermostat_of(self.config)

    def batches(self, count: int) -> list[StepBatch]:
        """The first so many of this run, on its device."""
        with closing(self.experiment.lanes.batches(PlanPosition())) as batches:
            return [batch.to(self.world.device) for _, batch in islice(batches, count)]

    def step(self, batch: StepBatch) -> Seconds:
        """One step as `ipvla.training.loop` takes it, with no reading due."""
        state, training, optimizer = self.experiment.state, self.config.training, self.config.optimizer
        lr = optimizer.learning_rate(min(state.step, training.steps - 1), training.steps)
        with _timed(self.world) as seconds:
            training_step(state, [batch], lr, optimizer.max_grad_norm, self._autocast)
            state.step += 1
            if state.protection:
                state.protection.regulate(1, self.world)
        return seconds

    def read(self) -> Seconds:
        """One reading of the Thermostat, and what follows from it."""
        protection = self.experiment.state.protection
        assert protection is not None
        with _timed(self.world) as seconds:
            protection.regulate(self.thermostat.every * self._readings, self.world)
        self._readings += 1
        return seconds

    def calibrate(self) -> Seconds:
        """Takes calibration's readings; what the last of them takes."""
        return [self.read() for _ in range(self.thermostat.calibration)][-1]


def play(trainers: Mapping[str, Trainer], settings: StepCostConfig) -> dict[str, FloatArray]:
    """Seconds [rounds, PARTS] by clock."""
    names, rounds = list(trainers), []
    for number, batch in enumerate(trainers["baseline"].batches(settings.warmup + settings.rounds)):
        parts: dict[str, Seconds] = {}
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            parts[name] = trainers[name].step(batch)
            if name == "thermostat":
                parts["reading"] = trainers[name].read()
        rounds.append(parts)
    counted = rounds[settings.warmup :]
    return {
        clock: np.array([[parts[part][clock] for part in PARTS] for parts in counted]) for clock in ("wall", "cpu")
    }


def ratios(seconds: FloatArray, every: int, settings: StepCostConfig) -> list[Estimate]:
    """Method over baseline, and method with its share of a reading over method, of seconds [rounds, PARTS]."""

    def both(seconds: FloatArray) -> FloatArray:
        baseline, method, _, reading = np.moveaxis(np.median(seconds, axis=-2), -1, 0)
        return np.stack([method / baseline, (method + reading / every) / method])

    return rounds_drawn(both, seconds, settings.draws, settings.seed)


def rounds_drawn(
    statistics: Callable[[FloatArray], FloatArray], rounds: FloatArray, draws: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Statistics [S] of measurements [rounds, ...], with 95 % intervals from rounds drawn with replacement.

    Args:
        statistics: of [..., rounds, columns], as [S, ...].
    """
    lows, highs = percentiles(statistics(resampled(rounds, draws, seed)).T)
    return [Estimate(*map(float, one)) for one in zip(statistics(rounds), lows, highs, strict=True)]


@contextmanager
def _timed(world: World) -> Iterator[Seconds]:
    """Fills in what the block takes by either clock, the device's work included."""

    def wait() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    seconds: Seconds = {}
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    yield seconds
    wait()
    seconds.update(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)
