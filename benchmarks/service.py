"""The service as its users run it: what Ray Train and MLflow cost, and a sweep that is killed and goes on.

    python -m benchmarks.service [--parts "[training, sweep]"] [--quick true]

- training: Ray Train's worker against a bare PyTorch loop, and MLflow's share of a training (`service_training`).
- sweep: the Thermostat's gains on the embedded default, killed once in the middle, up to the comparison of the
  best trial with the default on fresh seeds and layouts (`service_sweep`).

Both rest on the demonstrations, the base policy and the artifact of `benchmarks.forgetting` with the seed that is
given: made where they are missing, in a time that is told apart. A full run writes
`benchmarks/results/service.json`; one of some parts keeps what is there of the others. Started again after an
interruption, it goes on where it was. `--quick` measures training in small, in a temporary place, and its results
mean nothing; nor do those of a quick sweep, which has to be asked for by `--parts`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import draccus
import yaml
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.forgetting import ForgettingBenchmark
from benchmarks.forgetting_study import ForgettingStudy
from benchmarks.record import Target, read_record, write_record
from benchmarks.scratch import placed
from benchmarks.service_sweep import KilledSweep
from benchmarks.service_tables import SERVICE
from benchmarks.service_training import (
    TurnsConfig,
    medians,
    mlflow_seconds,
    step_times,
    trainer_ratio,
)
from benchmarks.tables import target_rows
from ipvla.experiment import ExperimentConfig
from ipvla.storage import SOURCE_TREE, StorageRoots
from ray_jobs.command_line.cli import ending_at_sigterm, run
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.quickstart import Stopwatch
from ray_jobs.running.cluster import connect

PARTS: Final = ("training", "sweep")
_PRESETS = SOURCE_TREE / "ray_jobs" / "experiments" / "forgetting"
#: What MLflow may be asked for at most: the default of `training.log_every`.
_LOG_EVERY = 20


@dataclass(frozen=True)
class ServiceStudy(StorageRoots):
    """What is measured.

    Attributes:
        quick: in small, in a temporary place unless a storage root is given.
        parts: of `PARTS`; by default all, or the first one if quick.
        seed: of the base policy that trials start from, and of the trials.
        trials: of the sweep; at least 2, or there is no middle.
        turns: of the worker and of the bare loop, of 20 steps each.
        steps: of the training in which MLflow's share is measured.
    """

    quick: bool = False
    parts: list[str] = field(default_factory=list)
    seed: int = 100
    trials: int = 24
    turns: int = 40
    steps: int = 600

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"parts: {unknown} cannot be measured; choose among {', '.join(PARTS)}")
        for name, least in {"seed": 0, "trials": 2, "turns": 2, "steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def measured(self) -> list[str]:
        """The parts, in their order."""
        wanted = self.parts or (PARTS[:1] if self.quick else PARTS)
        return [part for part in PARTS if part in wanted]

    @property
    def forgetting(self) -> ForgettingStudy:
        """The study whose data and base policy these are."""
        return parse(
            ForgettingStudy,
            arguments(
                {
                    "quick": self.quick,
                    "tune": True,  # one seed, and no second task
                    "methods": ["hsw_thermostat"],
                    "seeds": [self.seed + 1],
                    "tuning_seed": self.seed,
                    **self.directories,
                }
            ),
        )

    @property
    def training(self) -> ExperimentConfig:
        """The base policy's training, by one worker and with MLflow at the default interval."""
        base = parse(ExperimentConfig, self.forgetting.base_arguments(self.seed))
        training = replace(base.training, precision="fp32", log_every=_LOG_EVERY, steps=self.steps)
        training = replace(training, checkpoint_every=self.steps)
        return replace(base, study="service", num_workers=1, training=training)

    def sweep_arguments(self) -> list[str]:
        """`ray_jobs.tune` with the preset, from the base policy and the artifact of `forgetting`."""
        subspaces = self.forgetting.subspaces(self.seed)[0]
        settings: dict[str, Any] = {
            "seed": self.seed,
            "start_from": str(self.forgetting.base(self.seed)),
            "forgetting.artifact": subspaces.name,
            "forgetting.probe": draccus.encode(subspaces.probe),
        }
        flags: dict[str, Any] = {"study": "service", "name": "sweep", "trials": self.trials, **self.directories}
        if self.quick:
            settings |= _small()
            episodes = {"ground_yellow": 1, "ground_red": 1}
            flags |= {"success.episodes": episodes, "success.num_simulators": 1, "confirm_seeds": [self.seed + 1]}
        sweep = ["--config_path", str(_PRESETS / "sweep.yaml"), *arguments(flags)]
        return [*sweep, *arguments({"settings": settings})]


def measure_training(study: ServiceStudy) -> dict[str, Any]:
    """Times of the worker, of the bare loop, and of MLflow; Ray must be connected."""
    turns = TurnsConfig(turns=study.turns)
    with _scratch(study) as directory:
        times = step_times(replace(study.training, name="turns", run_root_dir=directory), turns)
        mlflow = mlflow_seconds(replace(study.training, name="logged", run_root_dir=directory))
    ratios = {clock: trainer_ratio(times, turns, clock) for clock in ("ms", "cpu_ms")}
    return {
        "step_ms": medians(times),
        "turns": study.turns,
        "steps_of_a_turn": turns.steps,
        "same_weights": times.same_weights,
        "ratio": draccus.encode(ratios["ms"]),
        "ratio_cpu": draccus.encode(ratios["cpu_ms"]),
        "mlflow": mlflow,
    }


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, of the parts that there are figures of."""
    found: list[Target] = []
    if "training" in figures:
        found += _training_targets(figures["training"])
    if "sweep" in figures:
        found += _sweep_targets(figures["sweep"])
    return found


def _training_targets(training: Mapping[str, Any]) -> list[Target]:
    ratio, mlflow = training["ratio"], training["mlflow"]
    same = "the same" if training["same_weights"] else "other"
    return [
        Target(
            "trainer_ratio",
            ratio["value"] if training["same_weights"] else None,
            1.03,
            False,
            interval=(ratio["low"], ratio["high"]),
            note=f"medians of {training['turns']} turns of {training['steps_of_a_turn']} steps each, with the "
            f"worker's log to console and file; both end with {same} weights",
        ),
        Target(
            "mlflow_share",
            mlflow["logging_s"] / mlflow["training_s"],
            0.01,
            False,
            note=f"{1e3 * mlflow['logging_s']:.0f} ms of {mlflow['training_s']:.0f} s; SQLite, every "
            f"{mlflow['log_every']} steps; to open the run took {mlflow['open_s']:.1f} s more, once",
        ),
    ]


def _sweep_targets(sweep: Mapping[str, Any]) -> list[Target]:
    ended = sweep["trials"]["finished"] + sweep["trials"]["stopped"]
    return [
        Target("sweep_trials", ended, 24, True, note="finished, or stopped early"),
        Target(
            "sweep_wall_s",
            sweep["seconds"],
            3600,
            False,
            note="both starts of the driver, with the comparison on fresh seeds; base policy and artifact were "
            "made before",
        ),
        Target(
            "sweep_repeated_trials",
            len(sweep["repeated"]),
            0,
            False,
            note=f"of the {sweep['ended_before_the_kill']} that had ended when the driver was killed",
        ),
    ]


def measure_sweep(study: ServiceStudy, console: Console) -> dict[str, Any]:
    """Figures of the killed sweep; no Ray may be connected, the sweep has a cluster of its own."""
    return KilledSweep(study.sweep_arguments()).run(console.print)


def prepare(study: ServiceStudy, console: Console) -> float:
    """Data, base policy and artifact, where they are missing; the seconds that took, over all starts."""
    directory = study.runs / "service"
    directory.mkdir(parents=True, exist_ok=True)
    stopwatch = Stopwatch(directory / "prepared_s.txt")
    with connect(study):
        ForgettingBenchmark(study.forgetting, console).prepare(study.seed)
    return stopwatch.read()


def main(study: ServiceStudy) -> None:
    """Measures, prints, and on a full run records after every part."""
    console = Console()
    if study.quick:
        study = replace(study, turns=4, steps=60, trials=min(study.trials, 3))
    earlier = None if study.quick else read_record("service")
    figures: dict[str, Any] = dict(earlier["figures"]) if earlier else {}
    with ending_at_sigterm(), placed(study, study.quick) as here:
        prepared_s = prepare(here, console)
        for part in here.measured:
            console.rule(part)
            if part == "training":
                with connect(here):
                    figures[part] = measure_training(here)
            else:
                figures[part] = {**measure_sweep(here, console), "prepared_s": prepared_s}
            if not study.quick:
                runs = earlier["runs"] if earlier else ()
                console.print(
                    f"written to {write_record('service', [study.seed], figures, targets(figures), runs)}"
                )
    for part in figures:
        console.print(Markdown(SERVICE[part](figures)))
    console.print(Markdown("\n".join(target_rows([target.to_dict() for target in targets(figures)]))))


def _small() -> dict[str, Any]:
    """Settings of a trial that takes seconds."""
    settings: dict[str, Any] = yaml.safe_load((_PRESETS / "quick" / "train.yaml").read_text())
    return settings | {"training": {"steps": 4, "checkpoint_every": 2, "log_every": 1}}


@contextmanager
def _scratch(study: StorageRoots) -> Any:
    """A run root of its own, so that every measurement begins anew."""
    with tempfile.TemporaryDirectory(dir=study.tmp) as directory:
        yield Path(directory)


if __name__ == "__main__":
    run(ServiceStudy, main, __doc__)
