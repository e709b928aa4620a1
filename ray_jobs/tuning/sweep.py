"""A sweep: many trials of one experiment under Ray Tune, with what they may vary, and where it stands on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import draccus
import yaml
from draccus.utils import ParsingError
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from evaluators.success import SuccessConfig
from ipvla.experiment import ExperimentConfig
from ipvla.files import write_text
from ipvla.storage import StorageRoots
from ray_jobs.command_line.settings import SettingError, parse, with_values
from ray_jobs.tuning.search_space import Dimension, require_usable
from ray_jobs.tuning.trial import (
    NEW,
    OLD,
    SCORE,
    STEP,
    Scoring,
    flat,
    play,
    play_start,
    require_both,
    rungs,
    train_to,
)

_logger = logging.getLogger(__name__)

_SEARCHES = ("optuna", "random")
_SCHEDULERS = ("interval", "asha", "none")
#: A training that writes nothing for so long has ended, or plays.
_SILENT_S = 600.0
_ROOTS = tuple(root.name for root in fields(StorageRoots))
_OBJECTIVES = ("score", "pareto")
#: A trial's driver only waits. It must ask for something; this leaves every core to workers and simulators.
_DRIVER = tune.PlacementGroupFactory([{"memory": float(2**20)}])


@dataclass(frozen=True)
class SweepConfig(StorageRoots):
    """What is searched, how, and what a trial is worth.

    Attributes:
        study: the MLflow experiment; the sweep lies in `run_root_dir/study/name`, its trials beside it.
        name: the sweep's; the same again goes on where it was interrupted.
        experiment: YAML file that `ray_jobs.train` takes.
        settings: dotted name -> value, over the experiment's, for every trial.
        space: dotted name -> range (`low`, `high`, `log`) or `choices`.
        trials: in all.
        search: "optuna" (TPE; NSGA-II for a pareto objective) or "random".
        scheduler: at a trial's checkpoints, "interval" stops those whose score lies surely below the best one's
            (their 95 % intervals are apart), "asha" the lower half, "none" stops none.
        objective: "score" (`scoring`), or "pareto": new-task success and retention, of which neither is given up.
        concurrent: trials at a time; each takes what its training, or its simulators, ask for.
        seed: of the search.
        success: what a trial plays at each of its checkpoints.
        scoring: what of it is new, and how both sides make a score.
        confirm_seeds: of the trainings that finally compare best and default; none of the trials'.
        confirm_first_layout: of the episodes of that comparison, which no trial has played.
    """

    study: str = "forgetting"
    name: str = "sweep"
    experiment: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Dimension] = field(default_factory=dict)
    trials: int = 24
    search: str = "optuna"
    scheduler: str = "interval"
    objective: str = "score"
    concurrent: int = 1
    seed: int = 0
    success: SuccessConfig = field(default_factory=SuccessConfig)
    scoring: Scoring = field(default_factory=Scoring)
    confirm_seeds: tuple[int, ...] = (1, 2, 3)
    confirm_first_layout: int = 90_000

    def __post_init__(self) -> None:
        for name, known in (("search", _SEARCHES), ("scheduler", _SCHEDULERS), ("objective", _OBJECTIVES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in ("trials", "concurrent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.objective == "pareto" and self.scheduler == "asha":
            raise ValueError(
                "scheduler asha would need one number, not objective pareto; choose scheduler interval or none"
            )
        if self.experiment is None:
            raise ValueError("experiment: no file was given; name the YAML file that ray_jobs.train would take")
        require_both(self.success, self.scoring)

    @property
    def directory(self) -> Path:
        return self.runs / self.study / self.name

    def absolute(self) -> Self:
        """With absolute paths, those among `settings` too."""
        sweep = super().absolute()
        trained = draccus.encode(sweep.trained("check", {}))
        return replace(sweep, settings={name: _leaf(trained, name) for name in self.settings})

    def training(self) -> dict[str, ExperimentConfig]:
        """The trainings of this sweep that wrote something of late and are not finished, by name."""
        runs = {}
        for record in self.directory.parent.glob(f"{self.name}-*/experiment.json"):
            with contextlib.suppress(OSError, ValueError, ParsingError):  # it is being written
                written = max(path.stat().st_mtime for path in record.parent.iterdir())
                if time.time() - written < _SILENT_S and not (record.parent / "policy").exists():
                    runs[record.parent.name] = _experiment(record, record.stat().st_mtime_ns)
        return runs

    def require_usable(self) -> None:
        """SettingError for a name or value that the experiment would refuse in some trial."""
        base = self.trained("check", {})
        require_usable(self.space, base)
        if base.seed in self.confirm_seeds:
            raise SettingError(f"confirm_seeds: {base.seed} is the trials' own seed; choose others")

    def trained(self, suffix: str, values: Mapping[str, Any]) -> ExperimentConfig:
        """The experiment with these values, as run `NAME-suffix` of the study, nested under the sweep's.

        Of its policies only the best becomes a model in the registry, which is called STUDY.NAME.
        """
        experiment = parse(ExperimentConfig, ["--config_path", str(self.experiment)])
        config = with_values(experiment, {**self.settings, **values})
        config = config.absolute()
        roots = {name: getattr(self, name) for name in _ROOTS}
        tracking = replace(
            config.tracking, register=False, model=config.tracking.model_name(self.study, self.name)
        )
        return replace(
            config,
            study=self.study,
            name=f"{self.name}-{suffix}",
            parent_run_key=str(self.directory),
            tracking=tracking,
            **roots,
        )


def _leaf(tree: Mapping[str, Any], name: str) -> Any:
    """What encoded settings have under a dotted name."""
    value: Any = tree
    for part in name.split("."):
        value = value[part]
    return value


@lru_cache(maxsize=256)
def _experiment(record: Path, written_ns: int) -> ExperimentConfig:
    """What `experiment.json` says; decoded once for each version of it."""
    experiment: ExperimentConfig = draccus.decode(ExperimentConfig, json.loads(record.read_text()))
    return experiment


@dataclass(frozen=True)
class Trial:
    """The outcome of a trial.

    Attributes:
        values: dotted name -> the value that it had.
        status: "finished", "stopped" (early) or "failed".
        step: up to which it was trained.
        told: scores at its last evaluation, see `Scoring.of`; empty if it failed before.
        error: why it failed.
    """

    name: str
    values: Mapping[str, Any]
    status: str
    step: int = 0
    told: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def run_trial(sample: Mapping[str, Any], sweep: SweepConfig, before: float | None) -> None:
    """What a trial's process does: trains from checkpoint to checkpoint, and reports what the policy is worth."""
    config = sweep.trained(tune.get_context().get_trial_id(), sample)
    for step in rungs(config):
        policy = train_to(config, step)
        table = play(config, policy, step, sweep.success, sweep.scoring, before)
        tune.report({STEP: step, **sweep.scoring.of(table)})


def run_sweep(sweep: SweepConfig) -> list[Trial]:
    """Runs the trials that are missing; all of them, in no certain order. Ray must be connected.

    Before that the policy that they start from plays what they will play: the reference, as run `NAME-start`.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # what a killed driver may have to look up again
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # which would end the sweep as if it were whole
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # or no trial finds a relative `experiment`
    place = sweep.directory / "tune"
    names = list(sweep.space)
    before = play_start(sweep.trained("start", {}), sweep.success, sweep.scoring)
    trainable = tune.with_resources(tune.with_parameters(run_trial, sweep=sweep, before=before), _DRIVER)
    looks = rungs(sweep.trained("check", {}))
    stop = SurelyWorse() if sweep.scheduler == "interval" else None
    if tune.Tuner.can_restore(str(place)):
        tuner = tune.Tuner.restore(str(place), trainable, resume_unfinished=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={name: dimension.domain() for name, dimension in sweep.space.items()},
            tune_config=tune.TuneConfig(
                num_samples=sweep.trials,
                search_alg=searcher(sweep),
                scheduler=_scheduler(sweep),
                trial_dirname_creator=_directory,
                max_concurrent_trials=sweep.concurrent if sweep.search != "random" else None,
                reuse_actors=True,  # a process costs seconds
            ),
            run_config=tune.RunConfig(
                name=place.name,
                storage_path=str(place.parent),
                verbose=0,
                stop=stop,
                callbacks=[_Told(sweep.trials, names)],
            ),
        )
    return [_trial(sweep, result, names, looks[-1]) for result in tuner.fit()]


def claim(sweep: SweepConfig) -> SweepConfig:
    """Keeps the sweep's settings and experiment at its first start; the sweep with that copy of the experiment.

    Trials read the copy, whose paths are absolute: they run in other working directories, and long after.

    Raises:
        SettingError: a sweep of the same name has others.
    """
    assert sweep.experiment is not None
    experiment = draccus.encode(parse(ExperimentConfig, ["--config_path", str(sweep.experiment)]).absolute())
    of_its_own = {name: value for name, value in experiment.items() if name not in _ROOTS}
    files = {
        sweep.directory / "experiment.yaml": yaml.safe_dump(of_its_own, sort_keys=False, width=115),
        sweep.directory / "config.json": json.dumps(draccus.encode(sweep), indent=1),
    }
    for path, text in files.items():
        if not path.exists():
            write_text(path, text)
        elif path.read_text() != text:
            raise SettingError(
                f"{sweep.directory} holds a sweep with other settings ({path.name} differs); give --name another "
                "value, or delete it"
            )
    return replace(sweep, experiment=sweep.directory / "experiment.yaml")


class SurelyWorse(tune.Stopper):
    """Stops a trial as soon as the best one's interval, after as many steps, lies above its own."""

    def __init__(self) -> None:
        self._best: dict[int, float] = {}

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        step, best = result[STEP], self._best.get(result[STEP], -math.inf)
        self._best[step] = max(best, result[f"{SCORE}/low"])
        return bool(result[f"{SCORE}/high"] < best)

    def stop_all(self) -> bool:
        return False


class _Told(tune.Callback):
    """One log line per look at a trial, and per trial that fails."""

    def __init__(self, trials: int, names: Sequence[str]) -> None:
        self._trials, self._names = trials, names

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
        _logger.info(
            "trial %d of %d, step %d: new %.2f, old %.2f, score %.2f (%.2f-%.2f) with %s",
            trials.index(trial) + 1,
            self._trials,
            *(result[name] for name in (STEP, NEW, OLD, SCORE, f"{SCORE}/low", f"{SCORE}/high")),
            flat(trial.config, self._names),
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trials.index(trial) + 1
        _logger.warning("trial %d of %d failed with %s", number, self._trials, flat(trial.config, self._names))


def _directory(trial: Any) -> str:
    """Its id, by which its training run is called as well."""
    return str(trial.trial_id)


def searcher(sweep: SweepConfig) -> Any:
    """Who proposes the trials' values, for Ray Tune."""
    if sweep.search == "random":
        return BasicVariantGenerator(max_concurrent=sweep.concurrent, random_state=sweep.seed)
    metric, mode = ([NEW, OLD], ["max", "max"]) if sweep.objective == "pareto" else (SCORE, "max")
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: Any = optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=max(4, sweep.trials // 3))
    if sweep.objective == "pareto":
        sampler = optuna.samplers.NSGAIISampler(seed=sweep.seed, population_size=max(4, sweep.trials // 3))
    return OptunaSearch(metric=metric, mode=mode, sampler=sampler)


def _scheduler(sweep: SweepConfig) -> Any:
    if sweep.scheduler != "asha":
        return None
    looks = rungs(sweep.trained("check", {}))
    return ASHAScheduler(
        time_attr=STEP, metric=SCORE, mode="max", max_t=looks[-1], grace_period=looks[0], reduction_factor=2
    )


def _trial(sweep: SweepConfig, result: Any, names: Sequence[str], last: int) -> Trial:
    scores = {k: v for k, v in (result.metrics or {}).items() if k.partition("/")[0] in (NEW, OLD, SCORE)}
    step = int((result.metrics or {}).get(STEP, 0))
    config = result.config or {}
    status = "failed" if result.error else "finished" if step == last else "stopped"
    error = _reason(result.error) if result.error else ""
    name = f"{sweep.name}-{Path(result.path).name}"
    return Trial(name, {n: config.get(n) for n in names}, status, step, scores, error)


def _reason(error: BaseException) -> str:
    """The last line of a traceback that names an error: the first cause stands last in Ray's texts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*:", line)]
    return (named or lines or [type(error).__name__])[-1][:300]
