"""What Ray Train's worker and MLflow add to a training.

    python -m benchmarks.service [--quick true]

The worker against a bare PyTorch loop, and MLflow's share of a training (`service_training`), of the base policy
of `studies.forgetting` with the seed that is given; its demonstrations are made where they are missing. A full run
writes `benchmarks/results/service.json`, beside what `python -m tests.endurance --parts "[sweep]"` wrote of a
sweep that is killed and goes on. `--quick` measures in small, in a temporary place, and its results mean nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Final

import draccus
from rich.console import Console

from benchmarks.parts import Figures, PartStudy, measure_parts
from benchmarks.service_training import TurnsConfig, mlflow_seconds, step_times, trainer_ratio
from ipvla.experiment import ExperimentConfig
from ray_jobs.command_line.cli import ending_at_sigterm, run
from ray_jobs.command_line.settings import parse
from ray_jobs.running.cluster import connect
from studies.engine import placed
from studies.forgetting import ForgettingRunner, ForgettingStudy
from studies.record import Target

#: What MLflow may be asked for at most: the default of `training.log_every`.
_LOG_EVERY: Final = 20


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


def measure_training(study: ServiceStudy, console: Console) -> Figures:
    """Times of the worker, of the bare loop, and of MLflow; Ray must be connected."""
    turns = TurnsConfig(turns=study.turns)
    ForgettingRunner(study.forgetting, console).collect(study.forgetting.collections)
    with tempfile.TemporaryDirectory(dir=study.tmp) as place:  # so that every measurement begins anew
        here = replace(study.training, run_root_dir=Path(place))
        times = step_times(replace(here, name="turns"), turns)
        mlflow = mlflow_seconds(replace(here, name="logged"))
    ratio, ratio_cpu = (draccus.encode(trainer_ratio(times, clock)) for clock in ("ms", "cpu_ms"))
    return {
        "step_ms": {name: median(ms) for name, ms in times.ms.items()},
        "turns": study.turns,
        "steps_of_a_turn": turns.steps,
        "same_weights": times.same_weights,
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
