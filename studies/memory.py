"""All memory mechanisms on all Recall families: who remembers what, for how long, and at what cost.

    python -m benchmarks.memory [--quick] [--storage_root DIR] [--mechanisms "[none, gru]"] [--seeds "[0, 1, 2]"]

One dataset; per training seed one starting policy whose memory is dropped; from it every mechanism, with the same
demonstrations in the same order and the same number of updates; each on held-out layouts of the seed's own. Then
reasoning once against reasoning at every step, and the costs. Started again after an interruption it goes on where
it was.

With every mechanism, `benchmarks/results/memory.json` and `docs/memory_delay.png` are written. Seeds of the same
recipe that are there already stay and count: seeds may be played on several days and machines. `--quick` takes
about two minutes, in a temporary directory; its results mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import draccus
import ray
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import MofNCompleteColumn, Progress

from benchmarks.memory_costs import CostConfig, costs
from benchmarks.memory_figures import delay_figures, joined, plot_delays, success_figures, targets
from benchmarks.memory_plan import EVERY, ONCE, plan_figures, play
from benchmarks.memory_study import MemoryStudy, drop_memory, mechanisms, reason_at_every_step, run_name
from benchmarks.record import read_record, write_record
from benchmarks.scratch import placed
from benchmarks.tables import memory_tables, target_rows
from evaluators.success_table import SuccessTable
from ipvla.data.dataset import open_dataset
from ipvla.experiment import ExperimentConfig
from ipvla.sim.suites import load_suite
from ipvla.storage import SOURCE_TREE
from ipvla.types import EpisodeResult
from ray_jobs.cli import run
from ray_jobs.cluster import connect
from ray_jobs.collect import collect
from ray_jobs.evaluate import evaluate
from ray_jobs.progress import CollectionDisplay
from ray_jobs.quickstart import Stopwatch
from ray_jobs.side_by_side import train_side_by_side

_QUICK_COSTS = CostConfig(late=40, around=2, steps=3, repeats=2)


@dataclass(frozen=True)
class Expected:
    """Minutes that the parts take on `cpus` cores, from what was seen on two cores of a cloud machine.

    Attributes:
        frames_per_s: trained on by one core.
        start_s: of one core, before and after a training.
        control_step_s, demonstration_steps: of the scripted expert.
        episode_s, plan_episode_s: of one core, for an episode of the evaluation, and for one played both ways.
        costs_s: of one mechanism.
    """

    study: MemoryStudy
    cpus: int
    frames_per_s: float = 250.0
    start_s: float = 20.0
    control_step_s: float = 0.0065
    demonstration_steps: float = 70.0
    episode_s: float = 0.7
    plan_episode_s: float = 2.5
    costs_s: float = 25.0

    @property
    def collection(self) -> float:
        config = self.study.collection
        demonstrations = 0 if config.directory.exists() else sum(config.demonstrations.values())
        return demonstrations * self.demonstration_steps * self.control_step_s / self.cpus / 60

    def training(self, experiments: Sequence[ExperimentConfig]) -> float:
        unfinished = [e for e in experiments if not (e.run_directory / "policy").exists()]
        frames = sum(e.training.steps * _policy_steps_per_update(e) for e in unfinished)
        return (frames / self.frames_per_s + self.start_s * len(unfinished)) / self.cpus / 60

    @property
    def evaluation(self) -> float:
        """Of one seed."""
        episodes = sum(self.study.evaluation(0).success.episodes.values())
        return episodes * len(self.study.names) * self.episode_s / self.cpus / 60

    @property
    def plan(self) -> float:
        """Of one seed."""
        return sum(self.study.plan(0).success.episodes.values()) * self.plan_episode_s / self.cpus / 60

    @property
    def costs(self) -> float:
        return self.costs_s * len(self.study.names) / 60

    @property
    def everything(self) -> float:
        """Of the whole study."""
        study = self.study
        starts = [study.start(seed) for seed in study.training_seeds]
        cells = [study.training(name, seed) for seed in study.training_seeds for name in study.names]
        plan = self.plan if "prompt" in study.names else 0.0
        per_seed = self.evaluation + plan
        training = self.training([*starts, *cells])
        return self.collection + training + per_seed * len(study.training_seeds) + self.costs


class MemoryBenchmark:
    """The stages, each of which does what is missing; Ray must be connected."""

    def __init__(self, study: MemoryStudy, console: Console) -> None:
        self.study, self.console = study, console
        self.expected = Expected(study, max(1, int(ray.cluster_resources().get("CPU", 1))))
        study.directory.mkdir(parents=True, exist_ok=True)
        self._stopwatch = Stopwatch(study.directory / "seconds.txt")

    def run(self) -> dict[str, Any]:
        """All stages; the figures."""
        study = self.study
        self.console.print(f"everything: at most about {self.expected.everything:.0f} minutes")
        with self._stage("demonstrations", self.expected.collection), CollectionDisplay(self.console) as display:
            collect(study.collection, display.update)
        self._train_starts()
        played: dict[str, dict[int, SuccessTable]] = {name: {} for name in study.names}
        speeds: dict[str, list[float]] = {name: [] for name in study.names}
        for seed in study.training_seeds:
            for name, frames_per_s in self._train(seed).items():
                speeds[name].append(frames_per_s)
            for name, table in self._evaluate(seed).items():
                played[name][seed] = table
        tasks = load_suite(study.collection.suite, study.cache).tasks
        figures: dict[str, Any] = {
            "recipe": self._recipe(),
            "success": success_figures(tasks, played),
            "delays": delay_figures(tasks, played),
        }
        if "prompt" in study.names:
            figures["plan"] = plan_figures(tasks, self._plan())
        measured = self._costs()
        figures["costs"] = {
            name: {**cost, "frames_per_s": sum(speeds[name]) / len(speeds[name])}
            for name, cost in measured.items()
        }
        return {**figures, "wall_s": self._stopwatch.read()}

    def _train_starts(self) -> None:
        seeds = self.study.training_seeds
        experiments = [self.study.start(seed) for seed in seeds]
        with self._stage("starting policies", self.expected.training(experiments)):
            starts = {f"seed {seed}, start": self.study.start_arguments(seed) for seed in seeds}
            train_side_by_side(starts, self.console)

    def _train(self, seed: int) -> dict[str, float]:
        """Every mechanism from this seed's starting policy: name -> training frames per second."""
        study = self.study
        drop_memory(study.start(seed).run_directory / "policy", study.bare_start(seed))
        expected = self.expected.training([study.training(name, seed) for name in study.names])
        with self._stage(f"seed {seed}: training", expected):
            cells = {f"seed {seed}, {name}": study.arguments(name, seed) for name in study.names}
            summaries = train_side_by_side(cells, self.console)
        return {name: summaries[f"seed {seed}, {name}"].frames_per_s for name in study.names}

    def _evaluate(self, seed: int) -> dict[str, SuccessTable]:
        with self._stage(f"seed {seed}: held-out layouts", self.expected.evaluation):
            tables = evaluate(self.study.evaluation(seed), self.console).tables
        return {name: next(t for t in tables if t.policy == run_name(name, seed)) for name in self.study.names}

    def _plan(self) -> dict[str, list[EpisodeResult]]:
        """Both ways on every seed's layouts."""
        results: dict[str, list[EpisodeResult]] = {ONCE: [], EVERY: []}
        for seed in self.study.training_seeds:
            config = self.study.plan(seed).success
            once = self.study.policy("prompt", seed)
            every = once.with_name("policy_reasoning_at_every_step")
            reason_at_every_step(once, every)
            total = sum(config.episodes.values())
            with (
                self._stage(f"seed {seed}: reasoning once against every step", self.expected.plan),
                Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=self.console) as progress,
            ):
                bar = progress.add_task("layouts played both ways", total=total)
                played = play(config, self.study.cache, {ONCE: once, EVERY: every}, partial(progress.advance, bar))
                progress.update(bar, completed=total)
            for name, of_seed in played.items():
                results[name] += of_seed
        return results

    def _costs(self) -> dict[str, dict[str, float]]:
        seed = self.study.training_seeds[0]
        config = _QUICK_COSTS if self.study.quick else CostConfig()
        dataset = open_dataset(self.study.collection.directory)
        measured = {}
        with self._stage("costs", self.expected.costs):
            for name in self.study.names:
                policy = self.study.policy(name, seed)
                cost = costs(policy, dataset, config, policy.parent / "costs.json")
                measured[name] = {**asdict(cost), "growth": cost.growth}
                self.console.print(f"{name}: {cost.act_ms_batch1:.1f} ms at batch 1, growth {cost.growth:.2f}")
        return measured

    def _recipe(self) -> dict[str, Any]:
        """All that two runs must share for their seeds to be counted together."""
        study = self.study
        evaluation, plan = study.evaluation(0).success, study.plan(0).success
        recipe = {
            "suite_version": load_suite(study.collection.suite, study.cache).version,
            "demonstrations": study.collection.demonstrations,
            "mechanisms": mechanisms(),
            "start": _training_recipe(study.start(0)),
            "training": _training_recipe(study.training("none", 0)),
            "episodes_per_seed": evaluation.episodes,
            "plan_episodes_per_seed": plan.episodes,
            "first_layout": evaluation.first_layout,
        }
        as_recorded: dict[str, Any] = json.loads(json.dumps(recipe))
        return as_recorded

    @contextmanager
    def _stage(self, title: str, expected: float) -> Iterator[None]:
        before = self._stopwatch.read()
        self.console.rule(f"{title} (at most about {expected:.1f} minutes)")
        yield
        after = self._stopwatch.read()
        self.console.print(f"{title}: {(after - before) / 60:.1f} minutes; {after / 60:.1f} in all")


def _policy_steps_per_update(experiment: ExperimentConfig) -> int:
    lanes, windows = experiment.lanes, experiment.training.accumulate
    return experiment.num_workers * lanes.lanes * lanes.window * windows


def _training_recipe(experiment: ExperimentConfig) -> dict[str, Any]:
    return {
        "updates": experiment.training.steps,
        "policy_steps_per_update": _policy_steps_per_update(experiment),
        **{name: draccus.encode(getattr(experiment, name)) for name in ("lanes", "model", "optimizer")},
    }


def main(study: MemoryStudy) -> None:
    """Runs what is missing, shows the tables, and records them if they are complete."""
    console = Console()
    with placed(study, study.quick) as here, connect(here):
        figures = MemoryBenchmark(here, console).run()
    for table in memory_tables(figures):
        console.print(Markdown(table))
    if study.complete:
        publish(study, figures, console)


def publish(study: MemoryStudy, figures: dict[str, Any], console: Console) -> None:
    """Writes record and plot, over the seeds of earlier runs of this recipe as well."""
    record, seeds, runs = read_record("memory"), set(study.training_seeds), []
    if record is not None and record["figures"]["recipe"] == figures["recipe"]:
        figures, seeds, runs = joined(record["figures"], figures), seeds | set(record["seeds"]), record["runs"]
    met = targets(figures)
    console.print(Markdown("\n".join(target_rows([target.to_dict() for target in met]))))
    plot_delays(figures["delays"], SOURCE_TREE / "docs" / "memory_delay.png")
    console.print(f"written to {write_record('memory', sorted(seeds), figures, met, runs)}")


if __name__ == "__main__":
    run(MemoryStudy, main, __doc__)
