"""A sweep's settings: what its trials may vary, what each is worth, and where it stands on disk."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import draccus
import yaml
from draccus.utils import ParsingError
from ray import tune

from evaluators.intervals import wilson_interval
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.experiment import ExperimentConfig
from ipvla.files import write_text
from ipvla.storage import StorageRoots
from ray_jobs.command_line.settings import SettingError, parse, with_values

#: What a trial reports: the names in Ray Tune and the sweep's table, and, below `forgetting/`, in MLflow.
NEW: Final = "new"
OLD: Final = "old"
SCORE: Final = "score"
STEP: Final = "step"
_SEARCHES = ("optuna", "random")
_SCHEDULERS = ("interval", "asha", "none")
_OBJECTIVES = ("score", "pareto")
#: A training that writes nothing for so long has ended, or plays.
_SILENT_S = 600.0
_ROOTS = tuple(root.name for root in fields(StorageRoots))


@dataclass(frozen=True)
class Dimension:
    """The values that one setting may take: a range, or a few choices.

    Attributes:
        low, high: ends of a range, low < high; whole numbers are drawn if both are written as such.
        log: evenly in the logarithm, for settings whose size is unknown.
        choices: instead of a range, at least two.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError(f"choices {list(self.choices)} and a range; give one of them")
            if len(self.choices) < 2:
                raise ValueError(f"choices is {list(self.choices)}; a sweep needs at least two values")
            return
        if self.low is None or self.high is None:
            raise ValueError(f"a range from {self.low} to {self.high}; give both ends, or choices")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range from {self.low} to {self.high}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range from {self.low}; it must begin above 0")

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def domain(self) -> Any:
        """For Ray Tune."""
        if self.choices:
            return tune.choice(list(self.choices))
        if self.is_whole:
            end = self.high + 1  # type: ignore[operator]  # Ray leaves the end out
            return tune.lograndint(self.low, end) if self.log else tune.randint(self.low, end)
        return tune.loguniform(self.low, self.high) if self.log else tune.uniform(self.low, self.high)


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

    most_used: ClassVar[tuple[str, ...]] = (
        "study", "name", "experiment", "space", "trials", "objective", "concurrent",
    )  # fmt: skip

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
        _require_both(self.success, self.scoring)

    @property
    def directory(self) -> Path:
        return self.runs / self.study / self.name

    def absolute(self) -> Self:
        """With absolute paths, those among `settings` too."""
        sweep = super().absolute()
        trained = draccus.encode(sweep.trained("check", {}))
        leaves = {name: reduce(getitem, name.split("."), trained) for name in self.settings}
        return replace(sweep, settings=leaves)

    def training(self) -> dict[str, ExperimentConfig]:
        """The trainings of this sweep that wrote something of late and are not finished, by name."""
        runs = {}
        for record in self.directory.parent.glob(f"{self.name}-*/experiment.json"):
            with contextlib.suppress(OSError, ValueError, ParsingError):  # it is being written
                written = max(path.stat().st_mtime for path in record.parent.iterdir())
                if time.time() - written < _SILENT_S and not (record.parent / "policy").exists():
                    runs[record.parent.name] = draccus.decode(ExperimentConfig, json.loads(record.read_text()))
        return runs

    def require_usable(self) -> None:
        """SettingError for a name or value that the experiment would refuse in some trial."""
        base = self.trained("check", {})
        if not self.space:
            raise SettingError("space is empty; name at least one setting to vary, with low and high, or choices")
        for name, dimension in self.space.items():  # where any value is refused, an end of the range is
            for value in dimension.choices or (
                dimension.low,
                dimension.high,
            ):
                try:
                    with_values(base, {name: value})
                except SettingError as error:
                    raise SettingError(f"space.{name} = {value}: {error}") from None
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


def _require_both(success: SuccessConfig, scoring: Scoring) -> None:
    """ValueError unless new and old tasks are played."""
    missing = [task for task in scoring.new_tasks if task not in success.episodes]
    if missing or not scoring.new_tasks:
        raise ValueError(
            f"scoring.new_tasks is {list(scoring.new_tasks)}; name tasks of success.episodes, which has "
            f"{list(success.episodes)}"
        )
    if set(scoring.new_tasks) == set(success.episodes):
        raise ValueError("success.episodes has new tasks only; add old ones, or nothing can be forgotten")


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
