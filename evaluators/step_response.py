"""The Thermostat's answer to a step: data that contradict what was learned come, and go again.

A run is trained on the new task, then on one that contradicts it and every old skill, then on the new task again.
It is one run in one process: weights, optimizer and Thermostat go on, the data are exchanged under them, and each
phase begins an epoch of its dataset, so that no episode is cut and no memory crosses. (Three runs by `start_from`
would each begin with a new optimizer, new adapters and another teacher; a dataset in that order would be
shuffled.) The learning rate is constant after warm-up: what changes is the data alone. The contradiction is the
new task's own demonstrations mirrored: the same pictures and words, but the hand is to go the other way.

Compared are the open loop, which is the constant 0, constant strengths, the closed loop, and its controls (see
`ipvla.forgetting.replay`). All arms take the same readings. A run's metrics are the lines of its `metrics.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import draccus
import numpy as np
import torch
from matplotlib.figure import Figure

from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.plan import PlanPosition
from ipvla.data.rlds import dataset_directory, write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.files import write_text
from ipvla.forgetting.replay import Line, constant, controls, trace
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.tracking import JsonlSink, read_jsonl
from ipvla.training.loop import train
from ipvla.training.parallel import World
from ipvla.types import Episode

OPEN, CLOSED = "open loop", "closed loop"


@dataclass(frozen=True)
class StepConfig:
    """The step response's plan.

    Attributes:
        new: dataset of the new task.
        conflicting: dataset that contradicts it, as `write_conflicting` makes it.
        steps: of the three phases, each a multiple of `thermostat.every`; calibration ends within the first.
        constants: strengths in (0, 1] that are held against the closed loop.
        log_every: training steps from one mean of the loss to the next.
    """

    new: str = "new_task"
    conflicting: str = "new_task_mirrored"
    steps: tuple[int, int, int] = (150, 150, 150)
    constants: tuple[float, ...] = (0.1, 1.0)
    log_every: int = 5

    def __post_init__(self) -> None:
        if min(self.steps) < 1:
            raise ValueError(f"steps is {list(self.steps)}; every phase must take at least 1")
        if not self.constants or not all(0 < strength <= 1 for strength in self.constants):
            raise ValueError(f"constants is {list(self.constants)}; give at least one, all in (0, 1]")
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every}; it must be at least 1")

    @property
    def phases(self) -> tuple[tuple[str, int, int], ...]:
        """(dataset, first step, last step) of each, counting optimizer steps from 1."""
        ends = np.cumsum(self.steps).tolist()
        spans = zip((self.new, self.conflicting, self.new), self.steps, ends, strict=True)
        return tuple((name, end - steps + 1, end) for name, steps, end in spans)

    def arms(self, config: ExperimentConfig) -> dict[str, ExperimentConfig]:
        """The closed loop of the experiment, and strengths that are constant from the first reading that acts.

        Raises:
            ValueError: there is no Thermostat, it replays, or the phases do not fit it.
        """
        thermostat = config.protected_by.thermostat if config.protected_by else None
        if thermostat is None or thermostat.mode == "replay":
            raise ValueError("a step response needs an experiment with forgetting.thermostat in a closed loop")
        if any(steps % thermostat.every for steps in self.steps):
            raise ValueError(
                f"steps is {list(self.steps)}; make each a multiple of thermostat.every {thermostat.every}"
            )
        if thermostat.every * thermostat.calibration >= self.steps[0]:
            raise ValueError(
                f"calibration ends at step {thermostat.every * thermostat.calibration}, the first phase at "
                f"{self.steps[0]}; calibrate less or make the phase longer"
            )
        constants = {f"constant {strength:g}": constant(strength, thermostat) for strength in self.constants}
        return self._runs(config, {OPEN: constant(0.0, thermostat), **constants, CLOSED: thermostat})

    def controls(self, config: ExperimentConfig, closed: Sequence[Line], seed: int) -> dict[str, ExperimentConfig]:
        """What replays the closed loop's run, given its metrics, by name. `seed` draws the other order.

        Raises:
            ValueError: these are not the metrics of the whole run.
        """
        thermostat = thermostat_of(config)
        found = controls(trace(closed, thermostat, sum(self.steps)), thermostat, seed)
        return self._runs(config, {f"its {name} strengths": regulator for name, regulator in found.items()})

    def _runs(
        self, config: ExperimentConfig, regulators: Mapping[str, ThermostatConfig]
    ) -> dict[str, ExperimentConfig]:
        assert config.forgetting is not None
        steps = sum(self.steps)
        training = replace(config.training, steps=steps, log_every=self.log_every, checkpoint_every=steps)
        data, optimizer = replace(config.data, dataset=self.new), replace(config.optimizer, final_lr_share=1.0)
        steady = replace(config, data=data, optimizer=optimizer, training=training)
        return {
            name: replace(steady, forgetting=replace(config.forgetting, thermostat=regulator))
            for name, regulator in regulators.items()
        }


def thermostat_of(config: ExperimentConfig) -> ThermostatConfig:
    """Of an experiment that has one."""
    assert config.forgetting is not None
    assert config.forgetting.thermostat is not None
    return config.forgetting.thermostat


def respond(config: ExperimentConfig, plan: StepConfig, record: Path) -> list[Line]:
    """Trains one arm in this process through all phases, or reads what `record` has of it: its metrics.

    Raises:
        DatasetError, CheckpointError, ArtifactError: as `ExperimentConfig.build`.
        ValueError, FloatingPointError: as training.
    """
    settings = {"optimizer": draccus.encode(config.optimizer), "plan": asdict(plan), **config.identity}
    made_from = json.loads(json.dumps(settings))
    told: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    if told.get("made_from") != made_from:
        told = {"made_from": made_from, "lines": _train_through(config, plan, record.with_suffix(".jsonl"))}
        write_text(record, json.dumps(told))
    lines: list[Line] = told["lines"]
    return lines


def _train_through(config: ExperimentConfig, plan: StepConfig, metrics: Path) -> list[Line]:
    metrics.unlink(missing_ok=True)  # of a training that was interrupted
    world = World(device=torch.device("cuda" if config.use_gpu else "cpu"))
    experiment, sink = config.build(world), JsonlSink(metrics)
    for number, (name, _, last) in enumerate(plan.phases):
        dataset = replace(config.data, dataset=name).build(config.datasets)
        lanes = config.lanes.build(dataset, experiment.policy.transforms, world.rank, world.size)
        experiment.state.position = PlanPosition(epoch=number)
        until = replace(config.training, steps=last)
        train(experiment.state, lanes, until, config.optimizer, world, sink, save=lambda: None)
    sink.close()
    return [*read_jsonl(metrics)]


@dataclass(frozen=True)
class Response:
    """What a run did, each a mean over the last third of a phase.

    Attributes:
        before_d, conflict_d, after_d: drift in the three phases.
        peak_d: largest reading while the data conflicted.
        conflict_loss: on the conflicting data.
        new_loss: on the new task, in the last phase.
        strength: mean over the training steps after calibration.
    """

    before_d: float
    conflict_d: float
    after_d: float
    peak_d: float
    conflict_loss: float
    new_loss: float
    strength: float


def response(lines: Sequence[Line], plan: StepConfig, thermostat: ThermostatConfig) -> Response:
    """Of one arm's metrics. ValueError if they lack a phase's readings or losses."""

    def within(name: str, first: int, last: int) -> list[float]:
        found = [line[name] for line in lines if name in line and first <= line["step"] <= last]
        if not found:
            raise ValueError(f"the metrics have no {name} at steps {first} to {last}; give those of the whole run")
        return found

    def settled(name: str, phase: tuple[str, int, int]) -> float:
        _, first, last = phase
        return fmean(within(name, last - (last - first + 1) // 3 + 1, last))

    _, conflict, last = plan.phases
    before_d, conflict_d, after_d = (settled("probe/d", phase) for phase in plan.phases)
    return Response(
        before_d,
        conflict_d,
        after_d,
        peak_d=max(within("probe/d", conflict[1], conflict[2])),
        conflict_loss=settled("train/loss", conflict),
        new_loss=settled("train/loss", last),
        strength=fmean(trace(lines, thermostat, sum(plan.steps))),
    )


def response_figures(method: str, seeds: Mapping[int, Mapping[str, Response]]) -> dict[str, Any]:
    """JSON values: what every arm did, by seed.

    Args:
        method: whose loop it is.
        seeds: training seed -> arm -> what it did.
    """
    names = next(iter(seeds.values()))
    arms = {name: {str(seed): asdict(seen[name]) for seed, seen in seeds.items()} for name in names}
    return {"method": method, "arms": arms}


def joined_responses(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of two sessions' seeds together; a seed that both have counts once, as `later` has it.

    Raises:
        ValueError: the sessions played other arms, or another method's loop.
    """
    theirs, ours = ((session["method"], *session["arms"]) for session in (earlier, later))
    if theirs != ours:
        raise ValueError(
            f"one session's step response is of {', '.join(theirs)}, the other's of {', '.join(ours)}; only "
            "responses of the same method and arms can be joined"
        )
    return {**later, "arms": {arm: {**earlier["arms"][arm], **seeds} for arm, seeds in later["arms"].items()}}


def plot_response(runs: Mapping[str, Sequence[Line]], plan: StepConfig, path: Path) -> None:
    """Drift, strength (what readings set) and loss of one seed over steps, as a PNG: an arm a colour."""
    panels = {"probe/d": "drift d", "gain/strength": "strength s", "train/loss": "loss"}
    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
        style, set_by = ("steps-post", "probe/d") if name.startswith("gain/") else ("default", name)
        for place, (arm, lines) in enumerate(runs.items()):
            curve = [(line["step"], line[name]) for line in lines if name in line and set_by in line]
            axes.plot(*zip(*curve, strict=True), color=f"C{place}", label=arm, drawstyle=style)
        for _, first, _ in plan.phases[1:]:
            axes.axvline(first - 0.5, color="gray", linestyle=":", linewidth=1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if name.startswith("gain/"):
            axes.set_ylim(-0.02, 1.02)
    top, bottom = figure.axes[0], figure.axes[-1]
    for (_, first, last), title in zip(plan.phases, ("new task", "conflicting", "new task"), strict=True):
        top.annotate(title, ((first + last) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center")
    bottom.set_xlabel("training step")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_conflicting(data_root: Path, plan: StepConfig, columns: Sequence[int] = (0, 1)) -> Path:
    """Writes `plan.conflicting`, if it is not there yet: `plan.new` with these columns of the action negated.

    Args:
        columns: by default sideways and forward, in the suites' actions.

    Raises:
        DatasetError: the new task's dataset is missing or damaged.
    """
    target = dataset_directory(data_root, plan.conflicting)
    if not target.exists():
        dataset = open_dataset(dataset_directory(data_root, plan.new))
        size = dataset.frame(0, 0, dataset.cameras[0]).shape[0]
        write_rlds(data_root, plan.conflicting, _mirrored(dataset, list(columns)), size)
    return target


def _mirrored(dataset: EpisodeDataset, columns: list[int]) -> Iterator[Episode]:
    for index in range(len(dataset)):
        recorded = dataset.episode(index)
        action = recorded.action.copy()
        action[:, columns] *= -1
        images = {
            camera: np.stack([dataset.frame(index, t, camera) for t in range(len(recorded))])
            for camera in dataset.cameras
        }
        same = ("task", "family", "instruction", "seed", "state", "reasoning", "questions", "answers")
        yield Episode(**{name: getattr(recorded, name) for name in same}, images=images, action=action)
