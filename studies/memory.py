"""All memory mechanisms on all Recall families: who remembers what, for how long, and at what cost.

    python -m studies.memory [--quick] [--storage_root DIR] [--mechanisms "[none, gru]"] [--seeds "[0, 1, 2]"]

One dataset; per training seed one starting policy whose memory is dropped; from it every mechanism of
`studies/memory.yaml`, with the same demonstrations in the same order and the same number of updates; each on
held-out layouts of the seed's own. Then reasoning once against reasoning at every step, and the costs.

With every mechanism, `benchmarks/results/memory.json` and `docs/memory_delay.png` are written. Seeds of the same
recipe that are there already stay and count. `--quick` takes about two minutes, in a temporary directory; its
results mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import draccus
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from evaluators.act_costs import CostConfig, costs
from evaluators.plots import whiskers
from evaluators.reasoning import EVERY, ONCE, plan_figures, play_both
from evaluators.success_table import SuccessRow, SuccessTable, tabulate
from ipvla.data.dataset import open_dataset
from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import NoMemoryConfig, PromptMemoryConfig
from ipvla.policy import Policy
from ipvla.sim.recall.tasks import RecallTask
from ipvla.sim.simulator import Task
from ipvla.sim.suites import load_suite
from ipvla.types import EpisodeResult
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.running.cluster import connect
from ray_jobs.running.display import EpisodeProgress
from studies.engine import DOCS, Runner, Study, as_json, entries, placed, publish
from studies.record import Figures, Target
from studies.tables import MEMORY, measured

_QUICK_COSTS = CostConfig(late=40, around=2, steps=3, repeats=2)
#: Family of the tasks that only the delay curve is about.
_DELAY = "delay"
#: Of these the better one must remember over a long delay.
_LONG_LIVED = ("latent", "bank")
#: Mechanism -> training seed -> its table, on layouts of the seed's own.
Played = Mapping[str, Mapping[int, SuccessTable]]


@dataclass(frozen=True)
class MemoryStudy(Study):
    """What is compared.

    Attributes:
        mechanisms: names of `studies/memory.yaml`; empty for all, or one if quick.
    """

    title: ClassVar[str] = "memory"
    grid: ClassVar[str] = "mechanisms"
    in_small: ClassVar[tuple[str, ...]] = ("prompt",)
    mechanisms: tuple[str, ...] = ()

    @property
    def collection(self) -> CollectConfig:
        return self.collected("collect")

    def start_arguments(self, seed: int) -> list[str]:
        """`ray_jobs.train` for the policy that all of this seed's mechanisms start from."""
        return self.run_arguments(self.preset("pretrain"), "start", seed)

    def arguments(self, mechanism: str, seed: int) -> list[str]:
        """`ray_jobs.train` for one cell; cells of a seed differ in name and `model.memory` alone."""
        values = {"model.memory": mechanisms()[mechanism], "start_from": self.bare_start(seed)}
        return self.run_arguments(self.preset("train"), mechanism, seed, **values)

    def training(self, mechanism: str, seed: int) -> ExperimentConfig:
        return parse(ExperimentConfig, self.arguments(mechanism, seed))

    def policy(self, mechanism: str, seed: int) -> Path:
        """Where a cell's policy lies."""
        return self.directory / f"seed{seed}-{mechanism}" / "policy"

    def bare_start(self, seed: int) -> Path:
        """Where a seed's starting policy lies once its memory is dropped."""
        return self.directory / f"seed{seed}-start" / "without_memory"

    def evaluation(self, seed: int) -> EvaluateConfig:
        """All mechanisms of a seed on the seed's own held-out layouts."""
        return self.evaluate_config("evaluate", [f"seed{seed}-{name}" for name in self.names], seed)

    def plan(self, seed: int) -> EvaluateConfig:
        """The layouts on which reasoning once and at every step are compared."""
        return self.evaluate_config("plan", [f"seed{seed}-prompt"], seed)

    @property
    def recipe(self) -> Figures:
        """All that two runs must share for their seeds to be counted together."""
        evaluation, plan = self.evaluation(0).success, self.plan(0).success
        start = parse(ExperimentConfig, self.start_arguments(0))
        recipe = {
            "suite_version": load_suite(self.collection.suite, self.cache).version,
            "demonstrations": self.collection.demonstrations,
            "mechanisms": mechanisms(),
            "start": training_recipe(start),
            "training": training_recipe(self.training("none", 0)),
            "episodes_per_seed": evaluation.episodes,
            "plan_episodes_per_seed": plan.episodes,
            "first_layout": evaluation.first_layout,
        }
        return as_json(recipe)


def mechanisms() -> Mapping[str, Mapping[str, Any]]:
    """Name in the tables -> settings of `model.memory`, in the tables' order."""
    return entries("memory")


def training_recipe(experiment: ExperimentConfig) -> dict[str, Any]:
    """Of a run, what its seeds must share to be counted together."""
    lanes, training = experiment.lanes, experiment.training
    frames = experiment.num_workers * lanes.lanes * lanes.window * training.accumulate
    settings = {name: draccus.encode(getattr(experiment, name)) for name in ("lanes", "model", "optimizer")}
    return {"updates": training.steps, "policy_steps_per_update": frames, **settings}


def drop_memory(trained: Path, bare: Path) -> None:
    """Writes the policy in `trained` without its memory to `bare`, if it is not there yet."""
    if not (bare / "policy.json").exists():
        policy = Policy.load(trained)
        config = replace(policy.config, memory=NoMemoryConfig())
        Policy.build(config, policy.transforms.conventions, policy.execute, policy.model).save(bare)


def reason_at_every_step(once: Path, every: Path) -> None:
    """Writes the `prompt` policy in `once` to `every`, if it is not there yet: same weights, `refresh` 1."""
    if not (every / "policy.json").exists():
        policy = Policy.load(once)
        memory = policy.config.memory
        if not isinstance(memory, PromptMemoryConfig):
            raise ValueError(f"{once} has memory {type(memory).__name__}; give a policy with memory.type prompt")
        config = replace(policy.config, memory=replace(memory, refresh=1))
        Policy.build(config, policy.transforms.conventions, policy.execute, policy.model).save(every)


def measure(study: MemoryStudy, runner: Runner) -> Figures:
    """All stages; the figures."""
    runner.collect([study.collection])
    starts = {f"seed {seed}, start": study.start_arguments(seed) for seed in study.training_seeds}
    runner.train("starting policies", starts)
    played: dict[str, dict[int, SuccessTable]] = {name: {} for name in study.names}
    speeds: dict[str, list[float]] = {name: [] for name in study.names}
    for seed in study.training_seeds:
        start = parse(ExperimentConfig, study.start_arguments(seed)).run_directory / "policy"
        drop_memory(start, study.bare_start(seed))
        runs = {f"seed {seed}, {name}": study.arguments(name, seed) for name in study.names}
        summaries = runner.train(f"seed {seed}: training", runs)
        with runner.stage(f"seed {seed}: held-out layouts"):
            tables = {table.policy: table for table in evaluate(study.evaluation(seed), runner.console).tables}
        for name in study.names:
            played[name][seed] = tables[f"seed{seed}-{name}"]
            speeds[name].append(summaries[f"seed {seed}, {name}"].frames_per_s)
    tasks = load_suite(study.collection.suite, study.cache).tasks
    figures: Figures = {
        "recipe": study.recipe,
        "success": success_figures(tasks, played),
        "delays": delay_figures(tasks, played),
    }
    if "prompt" in study.names:
        figures["plan"] = plan_figures(tasks, _reason_both_ways(study, runner))
    config = _QUICK_COSTS if study.quick else CostConfig()
    dataset, figures["costs"] = open_dataset(study.collection.directory), {}
    with runner.stage("costs"):
        for name in study.names:
            policy = study.policy(name, study.training_seeds[0])
            cost = costs(policy, dataset, config, policy.parent / "costs.json")
            speed = {"growth": cost.growth, "frames_per_s": fmean(speeds[name])}
            figures["costs"][name] = asdict(cost) | speed
            runner.console.print(f"{name}: {cost.act_ms_batch1:.1f} ms at batch 1, growth {cost.growth:.2f}")
    return {**figures, "wall_s": runner.seconds}


def _reason_both_ways(study: MemoryStudy, runner: Runner) -> dict[str, list[EpisodeResult]]:
    """On every seed's layouts."""
    results: dict[str, list[EpisodeResult]] = {ONCE: [], EVERY: []}
    for seed in study.training_seeds:
        once = study.policy("prompt", seed)
        every = once.with_name("policy_reasoning_at_every_step")
        reason_at_every_step(once, every)
        title, both = f"seed {seed}: reasoning once against every step", {ONCE: once, EVERY: every}
        with runner.stage(title), EpisodeProgress(runner.console) as progress:
            bar = progress.add_task("layouts played both ways", total=None)
            show = partial(progress.update, bar)
            for name, played in play_both(study.plan(seed).success, study.cache, both, show).items():
                results[name] += played
    return results


def success_figures(tasks: Sequence[Task], played: Played) -> dict[str, dict[str, Any]]:
    """Mechanism -> family -> the row pooled over seeds, with every seed's counts under `seeds`."""
    return {
        mechanism: {
            row.name: _row(row, {seed: table.families for seed, table in tables.items()})
            for row in _pooled(mechanism, tasks, tables).families
            if row.name != _DELAY
        }
        for mechanism, tables in played.items()
    }


def delay_figures(tasks: Sequence[Task], played: Played) -> dict[str, dict[str, Any]]:
    """Mechanism -> delay in control steps, ascending -> its row, as in `success_figures`."""
    recall = [task for task in tasks if isinstance(task, RecallTask) and task.family in ("recall", _DELAY)]
    delays = {task.name: task.delay_steps for task in recall}
    curves = {}
    for mechanism, tables in played.items():
        rows = [row for row in _pooled(mechanism, tasks, tables).tasks if row.name in delays]
        seeds = {seed: table.tasks for seed, table in tables.items()}
        rows.sort(key=lambda row: delays[row.name])
        curves[mechanism] = {str(delays[row.name]): _row(row, seeds) for row in rows}
    return curves


def _pooled(mechanism: str, tasks: Sequence[Task], tables: Mapping[int, SuccessTable]) -> SuccessTable:
    return tabulate(mechanism, tasks, [result for table in tables.values() for result in table.results], {})


def _row(row: SuccessRow, seeds: Mapping[int, Sequence[SuccessRow]]) -> dict[str, Any]:
    counts = {str(seed): {"k": r.k, "n": r.n} for seed, rows in seeds.items() for r in rows if r.name == row.name}
    return {**row.to_dict(), "seeds": counts}


def join_rows(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of `success_figures` over the seeds of both; one that both have counts as the later one has it."""

    def join(name: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
        seeds = dict(sorted((one["seeds"] | two["seeds"]).items(), key=lambda item: int(item[0])))
        k, n = (sum(counts[of] for counts in seeds.values()) for of in "kn")
        return {**SuccessRow(name, k, n, two["chance"]).to_dict(), "seeds": seeds}

    return {
        mechanism: {name: join(name, earlier[mechanism][name], row) for name, row in rows.items()}
        for mechanism, rows in later.items()
    }


def joined(earlier: Figures, later: Figures) -> Figures:
    """Figures of two runs of one recipe: success over the seeds of both, costs and the rest of the later run.

    A seed that both have counts once, as the later run has it. Reasoning once against every step is of the run
    that played more layouts.
    """

    figures = {**later, **{kind: join_rows(earlier[kind], later[kind]) for kind in ("success", "delays")}}
    figures["plan"] = max(later["plan"], earlier["plan"], key=lambda plan: plan["paired"]["pairs"])
    return figures


def third_best(success: Mapping[str, Mapping[str, Mapping[str, Any]]], family: str) -> float:
    """The success rate that three mechanisms reach at least. ValueError if fewer than three were evaluated."""
    rates = sorted((rows[family]["rate"] for rows in success.values()), reverse=True)
    if len(rates) < 3:
        raise ValueError(f"only {len(rates)} mechanisms were evaluated on {family}; compare at least 3")
    return float(rates[2])


def targets(figures: Figures) -> list[Target]:
    """What was promised, from the figures of a run that compared `none`, `latent` or `bank`, and `prompt`."""
    success, delays, costs, plan = (figures[name] for name in ("success", "delays", "costs", "plan"))
    blind = success["none"]["recall"]
    long_lived = [delays[name]["100"]["rate"] for name in _LONG_LIVED if name in delays]
    return [
        Target("recall_third_best", third_best(success, "recall"), 0.9, at_least=True),
        Target("count_third_best", third_best(success, "count"), 0.85, at_least=True),
        Target("recall_none", blind["wilson95"][0], blind["chance"], at_least=False),
        Target("delay100_best", max(long_lived), 0.8, at_least=True),
        Target("plan_once_speedup", min(plan["wall_speedup"], plan["cpu_speedup"]), 5.0, at_least=True),
        Target("act_cost_growth", max(cost["growth"] for cost in costs.values()), 1.1, at_least=False),
        Target("batch8_speedup", min(cost["batch8_speedup"] for cost in costs.values()), 2.0, at_least=True),
    ]


def plot_delays(delays: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Success against delay, a line with Wilson intervals per mechanism, and chance; PNG."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    panel = figure.subplots()
    markers = "osD^v<>Xph"
    for place, (mechanism, rows) in enumerate(delays.items()):
        aside = 1.02 ** (place - len(delays) / 2)  # or intervals would hide one another
        x = [int(delay) * aside for delay in rows]
        y = [row["rate"] for row in rows.values()]
        error = whiskers(y, [row["wilson95"] for row in rows.values()])
        marker = markers[place % len(markers)]
        panel.errorbar(x, y, error, label=mechanism, marker=marker, markersize=4, elinewidth=0.7)
    rows = next(iter(delays.values()))
    panel.axhline(next(iter(rows.values()))["chance"], color="gray", linestyle=":", linewidth=1, label="chance")
    panel.set_xscale("log")
    panel.set_xticks([int(delay) for delay in rows], labels=list(rows))
    panel.minorticks_off()
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("delay between cue and go (control steps of 1/20 s)")
    panel.set_ylabel("success on held-out layouts")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def main(study: MemoryStudy) -> None:
    """Runs what is missing, shows the tables, and records them if they are complete."""
    console = Console()
    with placed(study, study.quick) as here, connect(here):
        figures = measure(here, Runner(here.directory, console))
    for table in measured(figures, MEMORY):
        console.print(Markdown(table))
    if study.complete:
        figures = publish("memory", study.training_seeds, figures, joined, targets, console)
        plot_delays(figures["delays"], DOCS / "memory_delay.png")


if __name__ == "__main__":
    run(MemoryStudy, main, __doc__)
