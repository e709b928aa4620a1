"""Action heads on four Recall families: who acts well, from what memory, in how many evaluations, and how fast.

    python -m studies.heads [--quick] [--storage_root DIR] [--heads "[regression, flow]"] [--seeds "[0, 1, 2]"]

Per training seed every head of `studies/heads.yaml` with every memory, on the same demonstrations in the same
order; students of one step start from their teacher. With the first memory, and with none, a head plays all
families, the flow head by several samplings too; with every memory it plays recall, the memory intact, reset and
swapped. Then the costs of an act, and the distance of every integrator to the exact solution on trained fields.

With every head and memory, `benchmarks/results/heads.json` and two plots in docs/ are written. Seeds of the same
recipe that are there already stay and count. `--quick` takes some minutes, in a temporary directory; its results
mean nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from evaluators.act_costs import CostConfig, costs
from evaluators.memory_use import LossRow
from evaluators.success_table import SuccessTable
from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.experiment import ExperimentConfig
from ipvla.models.heads import Sampling
from ipvla.models.heads.integrators import INTEGRATORS
from ipvla.models.heads.layerwise import LayerwiseHead
from ipvla.policy import Policy
from ipvla.sim.suites import load_suite
from ipvla.types import ModelInputs
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.memory_use import MemoryUseJobConfig
from ray_jobs.memory_use import measure as measure_use
from ray_jobs.running.cluster import connect
from studies.engine import DOCS, SLICE, Runner, Study, as_json, entries, placed, publish
from studies.memory import join_rows, success_figures, training_recipe
from studies.record import Figures, Target
from studies.tables import HEADS, measured

MEMORIES: Final = ("gru", "none", "bank", "latent", "kv")
#: What generative heads are compared with.
_REFERENCE: Final = "regression"
_TEACHER, _STUDENT = "flow", "one_step"
#: Of the teacher, by name: at equal numbers of evaluations, and half of them.
SAMPLINGS: Final = {
    "euler8": Sampling(8, "euler"),
    "euler4": Sampling(4, "euler"),
    "euler1": Sampling(1, "euler"),
    "heun4": Sampling(2, "heun"),
    "midpoint4": Sampling(2, "midpoint"),
    "ab2_4": Sampling(4, "ab2"),
    "dpmpp2m_4": Sampling(4, "dpmpp2m"),
}
_EVALUATIONS = (1, 2, 4, 8, 16)
_EXACT = Sampling(64, "rk4")
_QUICK_COSTS = CostConfig(early=2, late=12, around=2, steps=3, repeats=2)


@dataclass(frozen=True)
class HeadsStudy(Study):
    """What is compared.

    Attributes:
        heads: names of `studies/heads.yaml`; empty for all, or some if quick.
        memories: types of `model.memory`; with the first of them all families are played.
    """

    title: ClassVar[str] = "heads"
    grid: ClassVar[str] = "heads"
    in_small: ClassVar[tuple[str, ...]] = (_REFERENCE, _TEACHER, _STUDENT)
    heads: tuple[str, ...] = ()
    memories: tuple[str, ...] = MEMORIES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.memories or len(set(self.memories)) < len(self.memories):
            raise ValueError(f"memories is {list(self.memories)}; name at least one, and none twice")
        if _STUDENT in self.heads and _TEACHER not in self.heads:
            raise ValueError(f"heads: {_STUDENT} learns from {_TEACHER}, which is not named; add it")

    @property
    def complete(self) -> bool:
        return super().complete and self.memories == MEMORIES

    @property
    def remembering(self) -> tuple[str, ...]:
        """The memories with which cells are trained."""
        return self.memories[:1] if self.quick else self.memories

    @property
    def collection(self) -> CollectConfig:
        return self.collected("collect")

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(head, memory); students have the first memory alone."""
        own = [(head, memory) for memory in self.remembering for head in self.names if head != _STUDENT]
        return own + ([(_STUDENT, self.memories[0])] if _STUDENT in self.names else [])

    def arguments(self, head: str, memory: str, seed: int) -> list[str]:
        """`ray_jobs.train` for one cell; cells of a seed differ in `model.head` and `model.memory` alone."""
        values: dict[str, Any] = {"model.head": entries("heads")[head], "model.memory.type": memory}
        if head == _STUDENT:
            values["start_from"] = self.policy(_TEACHER, memory, seed)
        preset = self.preset("distil" if head == _STUDENT else "train")
        return self.run_arguments(preset, f"{head}-{memory}", seed, **values)

    def policy(self, head: str, memory: str, seed: int) -> Path:
        """Where a cell's policy lies."""
        return self.directory / f"seed{seed}-{head}-{memory}" / "policy"

    def trained_with(self, memory: str) -> list[str]:
        """Heads."""
        return [head for head, of in self.cells if of == memory]

    def evaluation(
        self, seed: int, heads: Sequence[str], memory: str, sampling: Sampling | None = None
    ) -> EvaluateConfig:
        """Heads with one memory, on the seed's own held-out layouts."""
        names = [f"seed{seed}-{head}-{memory}" for head in heads]
        return replace(self.evaluate_config("evaluate", names, seed), sampling=sampling or Sampling())

    def use(self, seed: int) -> MemoryUseJobConfig:
        """Cells that have a memory, on recall."""
        named = [f"seed{seed}-{h}-{m}" for h, m in self.cells if m != "none"]
        given = [*self.preset("use"), *arguments({"study": self.study, "policies": named})]
        config = parse(MemoryUseJobConfig, given)
        first = config.success.first_layout + SLICE * seed
        return replace(config, success=replace(config.success, first_layout=first))

    @property
    def recipe(self) -> Figures:
        """All that two runs must share for their seeds to be counted together."""
        evaluation = self.evaluation(0, self.names, self.memories[0]).success
        students = {"student": self._recipe(_STUDENT)} if _STUDENT in self.names else {}
        return as_json(
            {
                "suite_version": load_suite(self.collection.suite, self.cache).version,
                "demonstrations": self.collection.demonstrations,
                "heads": dict(entries("heads")),
                "training": self._recipe(self.names[0]),
                "episodes_per_seed": evaluation.episodes,
                "first_layout": evaluation.first_layout,
                **students,
            }
        )

    def _recipe(self, head: str) -> dict[str, Any]:
        return training_recipe(parse(ExperimentConfig, self.arguments(head, self.memories[0], 0)))


#: Head, or sampling -> training seed -> its table, on layouts of the seed's own.
Played = dict[str, dict[int, SuccessTable]]


@dataclass
class Results:
    """What was played.

    Attributes:
        heads: with the first memory; forgetful: with none; samplings: of the teacher.
        use: head -> memory -> intervention -> seed -> fourfold counts on recall.
        heun4_euler8: seed -> fourfold counts of two samplings on the same layouts.
    """

    heads: Played = field(default_factory=dict)
    forgetful: Played = field(default_factory=dict)
    samplings: Played = field(default_factory=dict)
    use: dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]] = field(default_factory=dict)
    heun4_euler8: dict[str, dict[str, int]] = field(default_factory=dict)


def measure(study: HeadsStudy, runner: Runner) -> Figures:
    """All stages; the figures."""
    runner.collect([study.collection])
    results = Results()
    for seed in study.training_seeds:
        train(study, runner, seed)
        play(study, runner, seed, results)
    tasks = load_suite(study.collection.suite, study.cache).tasks
    return {
        "recipe": study.recipe,
        "success": success_figures(tasks, results.heads),
        "without_memory": success_figures(tasks, results.forgetful),
        "samplings": success_figures(tasks, results.samplings),
        "use": results.use,
        "heun4_euler8": results.heun4_euler8,
        **look_inside(study, runner),
        "wall_s": runner.seconds,
    }


def train(study: HeadsStudy, runner: Runner, seed: int) -> None:
    """Every cell, then the student of one step."""
    runs = {f"seed {seed}, {h}, {m}": study.arguments(h, m, seed) for h, m in study.cells if h != _STUDENT}
    runner.train(f"seed {seed}: training", runs)
    if _STUDENT in study.names:
        student = {f"seed {seed}, {_STUDENT}": study.arguments(_STUDENT, study.memories[0], seed)}
        runner.train(f"seed {seed}: distillation", student)


def play(study: HeadsStudy, runner: Runner, seed: int, results: Results) -> None:
    """Adds a seed's tables and counts to `results`."""
    main = study.memories[0]
    with runner.stage(f"seed {seed}: held-out layouts"):
        for memory, tables in (main, results.heads), ("none", results.forgetful):
            if heads := study.trained_with(memory):
                shown = evaluate(study.evaluation(seed, heads, memory), runner.console).tables
                for head, table in zip(heads, shown, strict=True):
                    tables.setdefault(head, {})[seed] = table
    if _TEACHER in study.names:
        with runner.stage(f"seed {seed}: other samplings of {_TEACHER}"):
            for name in list(SAMPLINGS)[: 1 if study.quick else None]:
                config = study.evaluation(seed, [_TEACHER], main, SAMPLINGS[name])
                (results.samplings.setdefault(name, {})[seed],) = evaluate(config, runner.console).tables
        if {"euler8", "heun4"} <= results.samplings.keys():
            tables_of = (results.samplings[name][seed] for name in ("euler8", "heun4"))
            results.heun4_euler8[str(seed)] = _paired(*tables_of)
    with runner.stage(f"seed {seed}: memory intact, reset and swapped"):
        uses = measure_use(study.use(seed), runner.console)
    for (head, memory), use in zip([c for c in study.cells if c[1] != "none"], uses, strict=True):
        kinds = results.use.setdefault(head, {}).setdefault(memory, {})
        for row in use.families:
            kinds.setdefault(row.intervention, {})[str(seed)] = {name: getattr(row, name) for name in _COUNTS}


def look_inside(study: HeadsStudy, runner: Runner) -> Figures:
    """Costs, errors of integrators and learned routing, of the first seed's policies."""
    seed, observations = study.training_seeds[0], 2 if study.quick else 64
    figures: Figures = {"costs": {}, "errors": {}, "routing": {}}
    dataset, config = open_dataset(study.collection.directory), _QUICK_COSTS if study.quick else CostConfig()
    with runner.stage("costs and errors"):
        for head in study.names:
            directory = study.policy(head, study.memories[0], seed)
            cost = costs(directory, dataset, config, directory.parent / "costs.json")
            described = Policy.load(directory).describe()
            figures["costs"][head] = asdict(cost) | {"evaluations": int(described.get("evaluations", 1))}
            runner.console.print(f"{head}: {cost.act_ms_batch1:.1f} ms at batch 1")
            if "integrator" in described and head != _STUDENT:
                figures["errors"][head] = field_errors(directory, dataset, observations)
            if weights := routing_weights(directory, dataset, observations):
                figures["routing"][head] = weights
    return figures


_COUNTS: Final = ("touched", "both", "only_undisturbed", "only_changed", "neither")


@torch.no_grad()
def field_errors(directory: Path, dataset: EpisodeDataset, observations: int) -> dict[str, dict[str, float]]:
    """Integrator -> evaluations -> RMS distance of normalised chunks to the exact solution, of a trained field.

    First observations of so many episodes, each with its own noise; the memory has just begun.
    """
    inputs, t = _seen(Policy.load(directory), dataset, observations)

    def chunks(sampling: Sampling) -> torch.Tensor:
        sampler = Policy.load(directory, sampling=sampling).model
        return sampler.act(inputs, sampler.initial_memory(observations), t, range(observations))[0]

    exact, errors = chunks(_EXACT), dict[str, dict[str, float]]()
    for name, integrator in INTEGRATORS.items():
        for evaluations in _EVALUATIONS:
            steps, rest = divmod(evaluations, integrator.evaluations)
            if not rest:
                distance = (chunks(Sampling(steps, name)) - exact).square().mean().sqrt()
                errors.setdefault(name, {})[str(evaluations)] = float(distance)
    return errors


@torch.no_grad()
def routing_weights(directory: Path, dataset: EpisodeDataset, observations: int) -> dict[str, dict[str, float]]:
    """Block -> language layer -> its mean weight in a policy whose blocks learn what to read; empty for others."""
    policy = Policy.load(directory)
    head, inputs, t = policy.model.head, *_seen(policy, dataset, observations)
    if not isinstance(head, LayerwiseHead) or not head.config.routing.learned:
        return {}
    features, _ = policy.model.memory.observe(
        policy.model.backbone, inputs, policy.initial_memory(observations), t
    )
    routes = head.conditions(features).routes
    assert routes is not None
    return {
        str(block): {str(layer): float(one) for layer, one in zip(head.read, row, strict=True)}
        for block, row in enumerate(routes.weights.mean(0))
    }


def _seen(policy: Policy, dataset: EpisodeDataset, observations: int) -> tuple[ModelInputs, torch.Tensor]:
    """The first observations of so many episodes, and their control steps."""
    chosen = np.linspace(0, len(dataset) - 1, observations).astype(int).tolist()
    cameras, points = policy.transforms.cameras, policy.transforms.points
    seen = [dataset.observation(index, 0, cameras, points) for index in chosen]
    return policy.transforms.inputs(seen), torch.zeros(observations, dtype=torch.long)


def plot_errors(errors: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """RMS distance to the exact solution against evaluations, a panel per head; PNG."""
    figure = Figure(figsize=(3.2 * len(errors), 3.4), layout="constrained")
    for panel, (head, of) in zip(
        figure.subplots(1, len(errors), sharey=True, squeeze=False)[0], errors.items(), strict=True
    ):
        for name, one in of.items():
            panel.loglog([int(n) for n in one], list(one.values()), marker="o", markersize=3, label=name)
        panel.set_title(head, fontsize=9)
        panel.set_xlabel("evaluations")
        panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def plot_routing(routing: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Mean weight of every language layer in every block, a panel per head; PNG."""
    figure = Figure(figsize=(3.2 * len(routing), 3.0), layout="constrained")
    for panel, (head, blocks) in zip(
        figure.subplots(1, len(routing), squeeze=False)[0], routing.items(), strict=True
    ):
        weights, layers = [list(row.values()) for row in blocks.values()], list(next(iter(blocks.values())))
        image = panel.imshow(weights, vmin=0, vmax=1, aspect="auto")
        panel.set_xticks(range(len(layers)), labels=layers)
        panel.set_yticks(range(len(blocks)), labels=list(blocks))
        panel.set_title(head, fontsize=9)
        panel.set_xlabel("language layer")
        panel.set_ylabel("block")
    figure.colorbar(image, ax=figure.axes, label="weight")
    figure.savefig(path, dpi=130)


def joined(earlier: Figures, later: Figures) -> Figures:
    """Figures of two runs of one recipe, over the seeds of both; costs and errors are the later run's."""
    figures = dict(later)
    for kind in ("success", "without_memory", "samplings"):
        figures[kind] = join_rows(earlier[kind], later[kind])
    figures["use"] = {
        head: {
            memory: {kind: earlier["use"][head][memory][kind] | seeds for kind, seeds in kinds.items()}
            for memory, kinds in memories.items()
        }
        for head, memories in later["use"].items()
    }
    figures["heun4_euler8"] = earlier["heun4_euler8"] | later["heun4_euler8"]
    return figures


def _paired(first: SuccessTable, second: SuccessTable) -> dict[str, int]:
    """The fourfold counts of two tables of the same episodes, by the names of `LossRow`."""
    by_key = {result.spec.key: result.success for result in second.results}
    pairs = Counter((result.success, by_key[result.spec.key]) for result in first.results)
    names = {"both": (True, True), "only_undisturbed": (True, False), "only_changed": (False, True)}
    counts = {name: pairs[pair] for name, pair in names.items()}
    return {"touched": pairs.total(), **counts, "neither": pairs[False, False]}


def pooled(seeds: Mapping[str, Mapping[str, int]], kind: str) -> LossRow:
    """Fourfold counts over all seeds."""
    return LossRow("recall", kind, 0, **{name: sum(counts[name] for counts in seeds.values()) for name in _COUNTS})


def bypassing(use: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Heads that, with a memory at least, lose nothing of what can be told when it is reset."""
    return [
        head
        for head, memories in use.items()
        if any(pooled(kinds["reset"], "reset").lost95[0] <= 0 for kinds in memories.values())
    ]


def targets(figures: Figures) -> list[Target]:
    """What was promised, from the figures of a run that compared all heads."""
    success, ms = figures["success"], {head: cost["act_ms_batch1"] for head, cost in figures["costs"].items()}
    generative = [head for head in success if head != _REFERENCE]

    def gap(head: str) -> float:
        rows = success[_REFERENCE]
        return max(float(rows[family]["rate"] - success[head][family]["rate"]) for family in rows)

    def whole(rows: Mapping[str, Mapping[str, Any]]) -> int:
        return sum(row["k"] for row in rows.values())

    best, solvers = min(generative, key=gap), pooled(figures["heun4_euler8"], "heun4")
    low, high = solvers.lost95
    student, teacher = (whole(success[head]) for head in (_STUDENT, _TEACHER))
    intact = pooled(figures["use"][_TEACHER]["bank"]["reset"], "reset")
    ignoring = bypassing(figures["use"])
    return [
        Target("generative_gap", gap(best), 0.03, at_least=False, note=f"{best}, its worst family"),
        Target(
            "heun4_minus_euler8", -solvers.lost, 0.0, at_least=True, interval=(-high, -low), note="all families"
        ),
        Target(
            "one_step_share", student / max(teacher, 1), 0.97, at_least=True, note="of the teacher's successes"
        ),
        Target("one_step_time_share", ms[_STUDENT] / ms[_TEACHER], 1 / 3, at_least=False, note="of a whole act"),
        Target(
            "flow_act_ratio", ms[_TEACHER] / ms[_REFERENCE], 1.3, at_least=False, note="of a whole act, batch 1"
        ),
        Target("recall_flow_bank", intact.undisturbed / intact.n, 0.9, at_least=True),
        Target("memory_bypass_heads", len(ignoring), 0, at_least=False, note=", ".join(ignoring)),
    ]


def main(study: HeadsStudy) -> None:
    """Runs what is missing, shows the tables, and records them if they are complete."""
    console = Console()
    with placed(study, study.quick) as here, connect(here):
        figures = measure(here, Runner(here.directory, console))
    for table in measured(figures, HEADS):
        console.print(Markdown(table))
    if study.complete:
        figures = publish("heads", study.training_seeds, figures, joined, targets, console)
        plot_errors(figures["errors"], DOCS / "heads_errors.png")
        plot_routing(figures["routing"], DOCS / "heads_routing.png")


if __name__ == "__main__":
    run(HeadsStudy, main, __doc__)
