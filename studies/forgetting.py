"""Fine-tuning on a new task, by our methods and by what users would pick instead: who learns it, who forgets what?

    python -m benchmarks.forgetting --tune true         # chooses each method's points, on a seed of its own
    python -m benchmarks.forgetting [--seeds "[0, 1]"]  # plays the chosen points on the seeds that are reported

Per seed one base policy is pretrained on the old skills; every method starts from it, with the same demonstrations
of the new task in the same order, the same adapters and the same number of updates. Every point, a strength at a
checkpoint, is played on the same held-out layouts of the new task and of the old skills.

The first command writes `benchmarks/results/forgetting_tuning.json`, the second `forgetting.json` beside it and
`docs/forgetting.png`. Seeds of the same recipe that are there already stay and count: seeds may be played on
several days and machines. Started again after an interruption, both go on where they were. `--quick` takes about
two minutes, in a temporary directory, and leaves out the sequence, the step response and the costs; its results
mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, TaskID

from benchmarks.forgetting_choice import choose, read_choice, write_choice
from benchmarks.forgetting_costs import StepCostConfig, step_costs
from benchmarks.forgetting_figures import figures, joined, targets
from benchmarks.forgetting_loop import Line
from benchmarks.forgetting_outcomes import Played, Point
from benchmarks.forgetting_plan import Plan
from benchmarks.forgetting_plot import plot_fronts
from benchmarks.forgetting_readings import Readings, read
from benchmarks.forgetting_response import (
    CLOSED,
    StepConfig,
    plot_response,
    respond,
    response,
    response_figures,
    write_conflicting,
)
from benchmarks.forgetting_sequence import SequenceRun, sequence_figures
from benchmarks.forgetting_study import ForgettingStudy, methods, same_recipe
from benchmarks.forgetting_tables import forgetting_tables
from benchmarks.record import read_record, write_record
from benchmarks.scratch import placed
from evaluators.rollout_status import RolloutStatus
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.atomic_file import write_text
from ipvla.experiment import ExperimentConfig
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ipvla.storage import SOURCE_TREE
from ipvla.training.interpolation import interpolate
from ray_jobs.cli import run
from ray_jobs.cluster import connect
from ray_jobs.collect import collect
from ray_jobs.progress import CollectionDisplay, episode_progress
from ray_jobs.quickstart import Stopwatch
from ray_jobs.side_by_side import train_side_by_side
from ray_jobs.subspaces import SubspacesConfig, read_teacher

_DOCS = SOURCE_TREE / "docs"


class ForgettingBenchmark:
    """The stages, each of which does what is missing; Ray must be connected."""

    def __init__(self, study: ForgettingStudy, console: Console) -> None:
        self.study, self.console = study, console
        study.directory.mkdir(parents=True, exist_ok=True)
        self._stopwatch = Stopwatch(study.directory / "seconds.txt")

    def play(self, points: Sequence[Point], seed: int) -> tuple[Played, dict[Point, Played]]:
        """Everything of one seed: its base policy and these points of its methods, made where missing, played."""
        self.prepare(seed)
        self._train(points, seed)
        policies = {"base": self.study.base(seed), **{str(p): self.study.policy(p, seed) for p in points}}
        readings = self._read(policies, seed)
        played = self._episodes(policies, readings, seed)
        return played["base"], {point: played[str(point)] for point in points}

    def sequence(self, points: Sequence[Point], seed: int) -> dict[str, SequenceRun]:
        """From these points, made by `play`, on to a second new task: method -> R over old, first and second."""
        study = self.study
        with self._stage(f"seed {seed}: {len(points)} policies learn a second task"):
            _find_missing([study.second_subspaces(point, seed) for point in points])
            runs = {f"seed {seed}, second, {p.method}": study.second_arguments(p, seed) for p in points}
            train_side_by_side(runs, self.console)
        policies = {"base": study.base(seed)}
        for point in points:
            policies[f"{point.method} after one"] = study.policy(point, seed)
            policies[f"{point.method} after two"] = study.second_policy(point, seed)
        tables = self._play(policies, study.sequence_success(seed), f"seed {seed}: the sequence", "sequence")
        scores = {name: study.sequence_scores(table) for name, table in tables.items()}
        return {
            p.method: SequenceRun(
                np.stack([scores["base"], scores[f"{p.method} after one"], scores[f"{p.method} after two"]])
            )
            for p in points
        }

    def step_response(self, closed: Point, seed: int) -> dict[str, list[Line]]:
        """How this closed loop, what replays it, and constant gains answer to a step: arm -> its metrics."""
        config, plan = self.study.training(closed, seed), StepConfig()
        place = self.study.directory / f"seed{seed}-response"
        respond_there = ray.remote(num_cpus=1)(respond)

        def play(arms: Mapping[str, ExperimentConfig]) -> dict[str, list[Line]]:
            lines = ray.get(
                [respond_there.remote(arm, plan, place / f"{name}.json") for name, arm in arms.items()]
            )
            return dict(zip(arms, lines, strict=True))

        with self._stage(f"seed {seed}: step response"):
            write_conflicting(config.datasets, plan)
            played = play(plan.arms(config))
            return played | play(plan.controls(config, played[CLOSED], seed))

    def costs(self, method: Point, regulated: Point, seed: int) -> dict[str, Any]:
        """What a training step costs with one point's method, and with the other one's Thermostat on top."""
        kept = self.study.directory / "costs.json"
        if not kept.exists():
            config, thermostat = (self.study.training(point, seed) for point in (method, regulated))
            assert config.forgetting is not None
            assert thermostat.forgetting is not None
            both = replace(config.forgetting, thermostat=thermostat.forgetting.thermostat)
            with self._stage("costs"):
                costs = step_costs(replace(config, forgetting=both), StepCostConfig())
            write_text(kept, json.dumps(costs.to_dict()))
        told: dict[str, Any] = json.loads(kept.read_text())
        return told

    def _collect(self) -> None:
        with self._stage("demonstrations"):
            for config in self.study.collections:
                with CollectionDisplay(self.console) as display:
                    collect(config, display.update)

    def prepare(self, seed: int) -> None:
        """Demonstrations, this seed's base policy and its subspaces, made where they are missing."""
        self._collect()
        with self._stage(f"seed {seed}: base policy"):
            train_side_by_side({f"seed {seed}, base": self.study.base_arguments(seed)}, self.console)
        with self._stage(f"seed {seed}: subspaces"):
            _find_missing(self.study.subspaces(seed))

    def _train(self, points: Sequence[Point], seed: int) -> None:
        """Runs that replay another's gains come after it."""
        sources = list(dict.fromkeys(self.study.source(point) for point in points))
        for replays in (False, True):
            runs = {
                f"seed {seed}, {p.method} {p.strength}": self.study.arguments(p, seed)
                for p in sources
                if bool(methods()[p.method].replays) == replays
            }
            if runs:
                with self._stage(f"seed {seed}: {len(runs)} fine-tunings"):
                    train_side_by_side(runs, self.console)
        for point in points:
            method, out = methods()[point.method], self.study.policy(point, seed)
            if method.interpolates and not (out / "policy.json").exists():
                tuned = self.study.policy(self.study.source(point), seed)
                coefficient = method.strengths[point.strength]["coefficient"]
                interpolate(self.study.base(seed), tuned, coefficient).save(out)

    def _read(self, policies: Mapping[str, Path], seed: int) -> dict[str, Readings]:
        """KL, drift and answers; none while points are chosen, which is by success alone."""
        if self.study.tune:
            return {}
        config, roots = self.study.readings(seed), (self.study.probes, self.study.cache)
        config.questions.build(self.study.cache)  # once, before two processes would
        reader = ray.remote(num_cpus=1)(read)
        with self._stage(f"seed {seed}: {len(policies)} policies read"):
            found = ray.get([reader.remote(config, policy, *roots) for policy in policies.values()])
        return dict(zip(policies, found, strict=True))

    def _episodes(
        self, policies: Mapping[str, Path], readings: Mapping[str, Readings], seed: int
    ) -> dict[str, Played]:
        title = f"seed {seed}: {len(policies)} policies on held-out layouts"
        played = {}
        for name, table in self._play(policies, self.study.success(seed), title, self.study.purpose).items():
            told = readings.get(name)
            played[name] = Played.of(
                table.results,
                self.study.new_tasks,
                told.questions if told else (),
                told.kl if told else None,
                told.drift if told else None,
            )
        return played

    def _play(
        self, policies: Mapping[str, Path], success: SuccessConfig, title: str, purpose: str
    ) -> dict[str, SuccessTable]:
        """Policy -> its table; the journal of each lies beside it, under the purpose's name."""
        tables = {}
        with (
            self._stage(title),
            success.build(self.study.cache) as evaluation,
            episode_progress(self.console) as progress,
        ):
            bar = progress.add_task("episodes", total=len(policies) * len(evaluation.specs))
            for done, (name, directory) in enumerate(policies.items(), 1):
                progress.update(bar, description=name)
                tables[name] = evaluation.run(
                    name,
                    PolicySource(Policy.load, directory),
                    directory.parent / f"episodes-{purpose}.sqlite",
                    on_status=partial(_advance, progress, bar, (done - 1) * len(evaluation.specs)),
                )
                progress.update(bar, completed=done * len(evaluation.specs))
        return tables

    @contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        before = self._stopwatch.read()
        self.console.rule(title)
        yield
        after = self._stopwatch.read()
        self.console.print(f"{title}: {(after - before) / 60:.1f} minutes; {after / 60:.1f} in all")


def _advance(progress: Progress, bar: TaskID, before: int, status: RolloutStatus) -> None:
    progress.update(bar, completed=before + status.played)


def _find_missing(configs: Sequence[SubspacesConfig]) -> None:
    """Side by side: each reads its teacher in a process of its own."""
    reader = ray.remote(num_cpus=1)(read_teacher)
    artifacts = {config.artifacts / str(config.name): config for config in configs}
    missing = {place: config for place, config in artifacts.items() if not (place / "meta.json").exists()}
    ray.get([reader.remote(config, place) for place, config in missing.items()])


def tune(study: ForgettingStudy, benchmark: ForgettingBenchmark, console: Console) -> None:
    """Plays every point of every method on the tuning seed, and writes down which are to be reported."""
    points = [point for name in study.names if not methods()[name].replays for point in study.points(name)]
    _, played = benchmark.play(points, study.tuning_seed)
    choice = choose(played, study.skills(new=True), study.skills(new=False))
    for name, chosen in choice.points.items():
        places = "; ".join(f"{point.strength} at {point.checkpoint}" for point in chosen)
        console.print(f"{name}: area {choice.areas[name]:.3f}, {places}")
    if study.complete:
        console.print(f"written to {write_choice(choice, study.tuning_seed, played)}")


def report(study: ForgettingStudy, benchmark: ForgettingBenchmark, console: Console) -> None:
    """Plays the chosen points, and publishes after every seed, so that none is lost."""
    choice = study.any_choice if study.quick else read_choice()
    plan = Plan.of(study, choice)
    for seed in study.training_seeds:
        base, played = benchmark.play(plan.points, seed)
        comparison = plan.comparison(study, seed, base, played)
        found = figures(comparison, 20 if study.quick else 2000) | {"recipe": study.recipe}
        if study.sequence_names and seed in study.sequence_seeds:
            runs = benchmark.sequence([choice.final(name) for name in study.sequence_names], seed)
            by_seed = {name: {seed: run} for name, run in runs.items()}
            found["sequence"] = sequence_figures(study.sequence_chance, by_seed)
        if not study.quick:
            found["costs"] = benchmark.costs(study.points("hsw")[0], study.points("hsw_thermostat")[0], seed)
            if plan.loop:
                found["response"] = respond_to_step(plan, benchmark, seed)
        if study.complete:
            found = publish(found, console)
        for table in forgetting_tables(found):
            console.print(Markdown(table))


def respond_to_step(plan: Plan, benchmark: ForgettingBenchmark, seed: int) -> dict[str, Any]:
    """Of the closed loop that was chosen; the plot beside the published tables shows this seed alone."""
    steps, method = StepConfig(), plan.loop["closed"]
    closed = plan.entries[method].final
    lines = benchmark.step_response(closed, seed)
    protection = benchmark.study.training(closed, seed).protected_by
    assert protection is not None
    assert protection.thermostat is not None
    if benchmark.study.complete:
        plot_response({arm: [seen] for arm, seen in lines.items()}, steps, _DOCS / "forgetting_step.png")
    responses = {arm: response(seen, steps, protection.thermostat) for arm, seen in lines.items()}
    return response_figures(method, {seed: responses})


def publish(found: dict[str, Any], console: Console) -> dict[str, Any]:
    """Writes record and plot, over the seeds of earlier runs of this recipe as well; returns these figures."""
    record, runs = read_record("forgetting"), []
    if record is not None and same_recipe(record["figures"]["recipe"], found["recipe"]):
        found, runs = joined(record["figures"], found), record["runs"]
    plot_fronts(found, _DOCS / "forgetting.png")
    console.print(f"written to {write_record('forgetting', found['seeds'], found, targets(found), runs)}")
    return found


def main(study: ForgettingStudy) -> None:
    """Chooses or reports."""
    console = Console()
    with placed(study, study.quick) as here, connect(here):
        benchmark = ForgettingBenchmark(here, console)
        (tune if here.tune else report)(here, benchmark, console)


if __name__ == "__main__":
    run(ForgettingStudy, main, __doc__)
