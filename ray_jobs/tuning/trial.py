"""One trial of a sweep: a training by `ray_jobs.train`'s own worker, looked at on the way, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from evaluators.console import result_note
from evaluators.intervals import wilson_interval
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.experiment import ExperimentConfig
from ipvla.rollout.policy_actor import PolicySource
from ray_jobs.running.policy_run import placed, training_run
from ray_jobs.train import checkpointed_policy, train_policy

#: What a trial reports: the names in Ray Tune and the sweep's table, and, below `forgetting/`, in MLflow.
NEW: Final = "new"
OLD: Final = "old"
SCORE: Final = "score"
STEP: Final = "step"


@dataclass(frozen=True)
class Scoring:
    """What a policy is worth: how well it does what is new, and how much it still knows.

    Attributes:
        new_tasks: tasks that are learned; all others that are played are old.
        least_new: success on them from which on retention alone counts.
        shortfall: what a point of success below that costs, in points of retention.
    """

    new_tasks: tuple[str, ...] = ()
    least_new: float = 0.8
    shortfall: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.least_new <= 1:
            raise ValueError(f"least_new is {self.least_new}; it is a success rate, in [0, 1]")
        if self.shortfall <= 0:
            raise ValueError(f"shortfall is {self.shortfall}; it must be above 0")

    def score(self, new: float, old: float) -> float:
        """Retention, less what success on the new tasks falls short of."""
        return old - self.shortfall * max(0.0, self.least_new - new)

    def of(self, table: SuccessTable) -> dict[str, float]:
        """`new`, `old` and `score`, each with the ends of its 95 % interval (`/low`, `/high`).

        A score's ends are those of `new` and `old` together: too wide rather than too narrow.
        """
        scores: dict[str, float] = {}
        for name, new in ((NEW, True), (OLD, False)):
            results = [r.success for r in table.results if (r.spec.task in self.new_tasks) == new]
            low, high = wilson_interval(sum(results), len(results))
            scores |= {name: sum(results) / len(results), f"{name}/low": low, f"{name}/high": high}
        for end in ("", "/low", "/high"):
            scores[f"{SCORE}{end}"] = self.score(scores[f"{NEW}{end}"], scores[f"{OLD}{end}"])
        return scores


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


def require_both(success: SuccessConfig, scoring: Scoring) -> None:
    """ValueError unless new and old tasks are played."""
    missing = [task for task in scoring.new_tasks if task not in success.episodes]
    if missing or not scoring.new_tasks:
        raise ValueError(
            f"scoring.new_tasks is {list(scoring.new_tasks)}; name tasks of success.episodes, which has "
            f"{list(success.episodes)}"
        )
    if set(scoring.new_tasks) == set(success.episodes):
        raise ValueError("success.episodes has new tasks only; add old ones, or nothing can be forgotten")


def flat(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """`gamma_min 0.1, beta_min 0.5`: the last part of every name says enough."""
    return ", ".join(f"{name.rpartition('.')[2]} {_short(values[name])}" for name in names)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
