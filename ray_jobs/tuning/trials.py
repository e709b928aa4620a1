"""A sweep's trials under Ray Tune: each a training by `ray_jobs.train`'s own worker, played on the way."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from evaluators.console import result_note
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.experiment import ExperimentConfig
from ipvla.rollout.chunking import HeadFacts
from ipvla.rollout.policy_actor import PolicySource
from ray_jobs.running.policy_run import placed, training_run
from ray_jobs.train import checkpointed_policy, train_policy
from ray_jobs.tuning.sweep import NEW, OLD, SCORE, STEP, Scoring, SweepConfig

_logger = logging.getLogger(__name__)

#: A trial's driver only waits. It must ask for something; this leaves every core to workers and simulators.
_DRIVER = tune.PlacementGroupFactory([{"memory": float(2**20)}])


def logged(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores of `Scoring.of` under their names in MLflow."""
    return {f"forgetting/{name}": value for name, value in scores.items()}


def rungs(config: ExperimentConfig) -> tuple[int, ...]:
    """The steps after which a trial is looked at: its checkpoints."""
    training = config.training
    return (*range(training.checkpoint_every, training.steps, training.checkpoint_every), training.steps)


def train_to(config: ExperimentConfig, step: int) -> Path:
    """Trains up to `step`, or what is missing of it; the policy as it is then."""
    train_policy(replace(config, training=replace(config.training, until=step)))
    return checkpointed_policy(config, step)


def play(
    config: ExperimentConfig,
    policy: Path,
    step: int,
    success: SuccessConfig,
    scoring: Scoring,
    before: float | None = None,
) -> SuccessTable:
    """Plays what is missing of the episodes of a policy of this run, and logs to the run's MLflow run.

    That gets `forgetting/{new, old, score}` beside success.

    Args:
        before: success on the old tasks before this training: MLflow also gets `forgetting/bwt`, the backward
            transfer (`evaluators.forgetting`; the old tasks count as one).
    """
    load, success = placed(success, config.use_gpu)
    journal = config.run_directory / f"episodes_{step:06d}_{success.first_layout}.sqlite"
    sink = training_run(config, renews=True)
    with success.build(config.cache) as evaluation:
        table = evaluation.run(config.name, PolicySource(load, policy), journal, sink=sink, step=step)
    scores = scoring.of(table)
    sink.log(logged(scores) | ({} if before is None else {"forgetting/bwt": scores[OLD] - before}), step)
    sink.note(result_note([table]))
    sink.close()
    return table


def play_start(config: ExperimentConfig, success: SuccessConfig, scoring: Scoring) -> float | None:
    """Success on the old tasks of the policy that this run starts from, if any; logged as the run's, at step 0."""
    if config.start_from is None:
        return None
    return scoring.of(play(config, config.start_from, 0, success, scoring))[OLD]


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
    execute = sweep.success.played_by.execute or config.lanes.stride
    sweep.success.pace.require(config.model.chunk, execute, HeadFacts.of(config.model.head))
    config.model.paced(sweep.success.slow)
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
                trial_dirname_creator=lambda trial: str(trial.trial_id),  # its training run is called so as well
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


def flat(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """`gamma_min 0.1, beta_min 0.5`: the last part of every name says enough."""
    return ", ".join(f"{name.rpartition('.')[2]} {_short(values[name])}" for name in names)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
