"""What studies share: entries of a YAML file and training seeds, trained, played on held-out layouts, published.

A study compares the entries of `studies/NAME.yaml`. Its jobs are configured by the presets in
`ray_jobs/experiments/NAME`, in small by those in `quick` below it. Each stage does what is missing, so a study
goes on where it was interrupted. Records join: seeds of the same recipe may be played on several days and
machines.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import ray
from rich.console import Console

from evaluators.rollout_status import RolloutStatus
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla import plain_yaml
from ipvla.choices import did_you_mean
from ipvla.experiment import ExperimentConfig
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ipvla.storage import SOURCE_TREE, StorageRoots
from ray_jobs.collect import CollectConfig, collect
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.evaluate import EvaluateConfig
from ray_jobs.quickstart import Stopwatch
from ray_jobs.running.display import CollectionDisplay, EpisodeProgress
from ray_jobs.running.side_by_side import train_side_by_side
from ray_jobs.train import TrainSummary
from studies.record import Figures, Target, conclude, read_record

DOCS: Final = SOURCE_TREE / "docs"
#: Held-out layouts from one seed's slice to the next one's.
SLICE: Final = 1000
#: Settings of a training that belong to a recipe.
RECIPE: Final = ("lanes", "model", "optimizer", "training", "num_workers")
Roots = TypeVar("Roots", bound=StorageRoots)
Result = TypeVar("Result")


@cache
def entries(name: str) -> Mapping[str, Any]:
    """What the study compares, in the tables' order: name -> settings."""
    named: Mapping[str, Any] = plain_yaml.load_file(Path(__file__).with_name(f"{name}.yaml"))
    return named


@dataclass(frozen=True)
class Study(StorageRoots):
    """Settings that all studies have.

    Attributes:
        quick: everything in small, in a temporary place unless a storage root is given; results mean nothing.
        seeds: of the trainings; each has its own starting policy and its own held-out layouts.
    """

    title: ClassVar[str]  # the stem of its YAML file and record
    grid: ClassVar[str]  # the setting that names entries
    in_small: ClassVar[tuple[str, ...]]  # those that are compared if quick
    quick: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in getattr(self, self.grid):
            if name not in entries(self.title):
                raise ValueError(f"{self.grid}: {name!r} is unknown; {did_you_mean(name, entries(self.title))}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; give at least one, all different and 0 or more")

    @property
    def study(self) -> str:
        """Its name below the run root."""
        return f"{self.title}-quick" if self.quick else self.title

    @property
    def directory(self) -> Path:
        return self.runs / self.study

    @property
    def training_seeds(self) -> tuple[int, ...]:
        return self.seeds[:1] if self.quick else self.seeds

    @property
    def names(self) -> tuple[str, ...]:
        """The entries that are compared, in the tables' order."""
        known = entries(self.title)
        selected = getattr(self, self.grid) or (self.in_small if self.quick else known)
        return tuple(name for name in known if name in selected)

    @property
    def complete(self) -> bool:
        """Does this say something of every entry, as the published tables do?"""
        return not self.quick and self.names == tuple(entries(self.title))

    def preset(self, name: str) -> list[str]:
        """The command line of a job by its preset, in this study's directories."""
        path = SOURCE_TREE / "ray_jobs" / "experiments" / self.title / ("quick" if self.quick else "")
        return ["--config_path", str(path / f"{name}.yaml"), *arguments(self.directories)]

    def run_arguments(self, preset: Sequence[str], name: str, seed: int, **values: Any) -> list[str]:
        """`ray_jobs.train` for one of a seed's runs."""
        names = {"study": self.study, "name": f"seed{seed}-{name}", "seed": seed, "lanes.seed": seed}
        return [*preset, *arguments(names | values)]

    def evaluate_config(self, preset: str, policies: Sequence[str], seed: int, **values: Any) -> EvaluateConfig:
        """Policies on the seed's own held-out layouts."""
        named = {"study": self.study, "policies": list(policies), "videos": 0, **values}
        config = parse(EvaluateConfig, [*self.preset(preset), *arguments(named)])
        first = config.success.first_layout + SLICE * seed
        return replace(config, success=replace(config.success, first_layout=first))

    def collected(self, preset: str) -> CollectConfig:
        return parse(CollectConfig, self.preset(preset))


@contextmanager
def placed(study: Roots, quick: bool) -> Iterator[Roots]:
    """The study with its directories made; one in small that names no storage root gets a temporary one."""
    with tempfile.TemporaryDirectory() as scratch:
        if quick and study.storage_root is None:
            study = replace(study, storage_root=Path(scratch))
        study.prepare()
        yield study


class Runner:
    """Stages that any study is made of; Ray must be connected."""

    def __init__(self, directory: Path, console: Console) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.console, self._stopwatch = console, Stopwatch(directory / "seconds.txt")

    @property
    def seconds(self) -> float:
        """Over all starts of the study."""
        return self._stopwatch.read()

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Says how long the block took."""
        before = self.seconds
        self.console.rule(title)
        yield
        after = self.seconds
        self.console.print(f"{title}: {(after - before) / 60:.1f} minutes; {after / 60:.1f} in all")

    def collect(self, configs: Iterable[CollectConfig]) -> None:
        with self.stage("demonstrations"):
            for config in configs:
                with CollectionDisplay(self.console) as display:
                    collect(config, display.update)

    def train(self, title: str, runs: Mapping[str, Sequence[str]]) -> dict[str, TrainSummary]:
        """Trains side by side what is not finished: name to show -> arguments of `ray_jobs.train`."""
        if not runs:
            return {}
        with self.stage(title):
            parsed = {name: parse(ExperimentConfig, given) for name, given in runs.items()}
            return train_side_by_side(parsed, self.console)

    def together(
        self, title: str, function: Callable[..., Result], calls: Sequence[Sequence[Any]]
    ) -> list[Result]:
        """The function's results, each call in a process of its own on one core."""
        there = ray.remote(num_cpus=1)(function)
        with self.stage(title):
            results: list[Result] = ray.get([there.remote(*call) for call in calls])
        return results

    def play(
        self, title: str, policies: Mapping[str, Path], success: SuccessConfig, cache_dir: Path, purpose: str
    ) -> dict[str, SuccessTable]:
        """Policy -> its table; the journal of each lies beside it, under the purpose's name."""
        tables = {}
        with self.stage(title), success.build(cache_dir) as played, EpisodeProgress(self.console) as progress:
            bar = progress.add_task("episodes", total=len(policies) * len(played.specs))

            def advance(before: int, status: RolloutStatus) -> None:
                progress.update(bar, completed=before + status.played)

            for number, (name, directory) in enumerate(policies.items()):
                progress.update(bar, description=name)
                journal = directory.parent / f"episodes-{purpose}.sqlite"
                before = partial(advance, number * len(played.specs))
                tables[name] = played.run(name, PolicySource(Policy.load, directory), journal, on_status=before)
                progress.update(bar, completed=(number + 1) * len(played.specs))
        return tables


def publish(
    name: str,
    seeds: Sequence[int],
    measurements: Figures,
    join: Callable[[Figures, Figures], Figures],
    targets: Callable[[Figures], list[Target]],
    console: Console,
) -> Figures:
    """Writes the record, over the seeds of earlier runs of this recipe as well; returns its figures."""
    record, runs = read_record(name), []
    if record is not None and same_recipe(record["figures"]["recipe"], measurements["recipe"]):
        measurements, runs = join(record["figures"], measurements), record["runs"]
        seeds = sorted({*seeds, *record["seeds"]})
    conclude(name, seeds, measurements, targets(measurements), console, earlier=runs)
    return measurements


def same_recipe(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    """Whether two recipes are one; a setting that has come since `earlier` was written had its default then."""
    return _completed(earlier) == _completed(later)


def _completed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of a training's settings that it does not know."""

    def complete(part: Any) -> Any:
        known = {name: part[name] for name in RECIPE if name in part} if isinstance(part, Mapping) else {}
        if not known:
            return part
        return {**part, **as_json(ExperimentConfig.completed(known))}

    return {name: complete(part) for name, part in recipe.items()}


def as_json(values: Mapping[str, Any]) -> Figures:
    """As a record gives them back: lists for tuples, text for names."""
    plain: Figures = json.loads(json.dumps(values))
    return plain
