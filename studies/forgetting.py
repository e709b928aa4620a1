"""Fine-tuning on a new task, by our methods and by what users would pick instead: who learns it, who forgets what?

    python -m studies.forgetting --tune true         # chooses each method's points, on a seed of its own
    python -m studies.forgetting [--seeds "[0, 1]"]  # plays the chosen points on the seeds that are reported

Per seed one base policy is pretrained on the old skills; every method of `studies/forgetting.yaml` starts from it,
with the same demonstrations of the new task in the same order, the same adapters and the same number of updates.
Every point, a strength at a checkpoint, is played on the same held-out layouts of the new task and of the old
skills.

The first command writes `benchmarks/results/forgetting_tuning.json`, the second `forgetting.json` beside it and
`docs/forgetting.png`. Seeds of the same recipe that are there already stay and count. `--quick` takes about two
minutes, in a temporary directory, and leaves out the sequence, the step response and the costs; its results mean
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import draccus
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from evaluators.forgetting import FloatArray, SequenceRun, sequence_figures
from evaluators.grounding import GroundingConfig, tabulate
from evaluators.pareto import area
from evaluators.readings import Readings, ReadingsConfig, read
from evaluators.step_costs import StepCostConfig, step_costs
from evaluators.step_response import (
    CLOSED,
    StepConfig,
    plot_response,
    respond,
    response,
    response_figures,
    thermostat_of,
    write_conflicting,
)
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from evaluators.tradeoffs import Comparison, Entry, Outcomes, Played, Point, Skill, success
from ipvla.experiment import ExperimentConfig
from ipvla.files import write_text
from ipvla.forgetting.replay import Line, controls, trace
from ipvla.sim.suites import load_suite
from ipvla.tracking import read_jsonl
from ipvla.training.interpolation import interpolate
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.running.cluster import connect
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from studies.engine import DOCS, RECIPE, SLICE, Runner, Study, as_json, entries, placed, publish
from studies.fronts import figures, joined, plot_fronts, targets
from studies.record import Figures, read_record, write_record
from studies.tables import FORGETTING, measured

#: Pictures that questions are about.
_ASKED = ("ground_red", "recall", "place")
#: Points of a method that are reported, at most.
_REPORTED = 2
_TUNING = "forgetting_tuning"


@dataclass(frozen=True)
class Method:
    """One way to fine-tune, as `studies/forgetting.yaml` has it.

    Attributes:
        role: of `evaluators.tradeoffs.ROLES`.
        strengths: name -> flags of `ray_jobs.train` over `settings`; every method tries as many. Of a method that
            interpolates: {"strength": of the trained method, "coefficient": in [0, 1]}.
        settings: flags over those of `baseline_lora.yaml`.
        uses: of `evaluators.tradeoffs.USES`.
        order: of ICSM's directions.
        interpolates: the method whose policies are mixed with the base, instead of a training.
        replays: "shuffled" or "mean": the gains are those of a closed loop's run (`ipvla.forgetting.replay`). Its
            points are named by `replay_of`, it has no strengths.
        constant: of a closed loop, the method that has constant gains instead.
        sequence: a second new task is learned after the first one.
    """

    role: str
    strengths: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    order: str = "sensitivity"
    interpolates: str | None = None
    replays: str | None = None
    constant: str | None = None
    sequence: bool = False


@cache
def methods() -> Mapping[str, Method]:
    """Name in the tables -> method, in the tables' order."""
    named = entries("forgetting")
    return {name: Method(**{**given, "uses": tuple(given.get("uses", ()))}) for name, given in named.items()}


@dataclass(frozen=True)
class Choice:
    """The outcome of tuning.

    Attributes:
        points: method -> its reported points, the final one first.
        areas: method -> area under its front on the tuning seed, of all points that it tried.
    """

    points: Mapping[str, tuple[Point, ...]]
    areas: Mapping[str, float]

    def final(self, method: str) -> Point:
        """The point that a user would take: the largest sum of new-task success and retention."""
        return self.points[method][0]

    def best(self, names: Sequence[str]) -> str:
        """Of these methods the one with the largest area."""
        return max(names, key=lambda name: self.areas[name])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Choice:
        """What `asdict` gave."""
        points = {name: tuple(Point(**point) for point in chosen) for name, chosen in values["points"].items()}
        return cls(points, values["areas"])


def choose(played: Mapping[Point, Played], new: Mapping[str, Skill], old: Mapping[str, Skill]) -> Choice:
    """From every point that was tried: the final one, then the one that adds most area under the front.

    One rule for all methods, on the tuning seed alone.
    """
    rates = {point: np.array([success(p.new, new), success(p.old, old)]) for point, p in played.items()}

    def under(points: Sequence[Point]) -> float:
        return area(np.stack([rates[point] for point in points]))

    chosen: dict[str, list[Point]] = {}
    tried: dict[str, list[Point]] = {}
    for point in played:
        tried.setdefault(point.method, []).append(point)
    for method, points in tried.items():
        reported = chosen[method] = [max(points, key=lambda point: float(rates[point].sum()))]
        while len(reported) < _REPORTED:
            gained = {p: under([*reported, p]) for p in points if p not in reported}
            best = max(gained, key=lambda point: gained[point], default=None)
            if best is None or gained[best] <= under(reported):
                break
            reported.append(best)
    areas = {method: under(points) for method, points in tried.items()}
    return Choice({method: tuple(points) for method, points in chosen.items()}, areas)


@dataclass(frozen=True)
class ForgettingStudy(Study):
    """What is compared.

    Attributes:
        tune: play every point of every method on the tuning seed and choose, instead of reporting.
        methods: names of `studies/forgetting.yaml`; empty for all, or two if quick.
        sequence_seeds: those of the seeds whose policies go on to a second new task.
        tuning_seed: none of `seeds`.
    """

    title: ClassVar[str] = "forgetting"
    grid: ClassVar[str] = "methods"
    in_small: ClassVar[tuple[str, ...]] = ("lora", "hsw_thermostat")
    tune: bool = False
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sequence_seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} is among the seeds; choose on another one")

    @property
    def training_seeds(self) -> tuple[int, ...]:
        return (self.tuning_seed,) if self.tune else super().training_seeds

    @property
    def trained(self) -> list[str]:
        """The methods that do not wait for another one's run."""
        return [name for name in self.names if not methods()[name].replays]

    @property
    def collections(self) -> tuple[CollectConfig, ...]:
        """The demonstrations that these methods need, and the probe's episodes."""
        named = ["pretraining", "new_task"]
        if any("replay" in methods()[name].uses for name in self.names):
            named.append("replay")
        if self.sequence_names:
            named.append("second_task")
        probe = replace(self.collected("collect_probe"), data_root_dir=self.probes)
        return *(self.collected(f"collect_{name}") for name in named), probe

    def base_arguments(self, seed: int) -> list[str]:
        """`ray_jobs.train` for the policy that all of this seed's methods start from."""
        return self.run_arguments(self.preset("pretrain"), "base", seed)

    def base(self, seed: int) -> Path:
        """Where this seed's base policy lies."""
        return parse(ExperimentConfig, self.base_arguments(seed)).run_directory / "policy"

    def subspaces(self, seed: int) -> tuple[SubspacesConfig, ...]:
        """ICSM of a seed's base policy, in every order of directions that a method takes.

        In the controls' orders these are directions alone; the first one has all that methods read.
        """
        orders = dict.fromkeys(["sensitivity", *(methods()[name].order for name in self.names)])
        configs = []
        for order in orders:
            config = self._subspaces(self.base(seed), self._artifact(seed, order), {"icsm.order": order})
            configs.append(config if order == "sensitivity" else replace(config, fisher=None, adapters=None))
        return tuple(configs)

    def _subspaces(self, teacher: Path, name: str, flags: Mapping[str, Any]) -> SubspacesConfig:
        values = {"teacher": teacher, "name": name, **flags}
        return parse(SubspacesConfig, [*self.preset("subspaces"), *arguments(values)])

    def readings(self, seed: int) -> ReadingsConfig:
        """What is read of a seed's policies without a simulator."""
        subspaces = self.subspaces(seed)[0]
        artifact = subspaces.artifacts / self._artifact(seed, "sensitivity")
        first = GroundingConfig().first_layout + SLICE * seed
        questions = GroundingConfig(tasks=_ASKED, episodes=2 if self.quick else 15, first_layout=first)
        return ReadingsConfig(self.base(seed), artifact, subspaces.probe, questions)

    def arguments(self, point: Point, seed: int) -> list[str]:
        """`ray_jobs.train` for one cell; those of a seed differ in what their methods' entries say alone."""
        flags = self._replayed(point, seed) if methods()[point.method].replays else self._flags(point, seed)
        return self._fine_tuning(_run_name(point), seed, **{"start_from": self.base(seed), **flags})

    def _flags(self, point: Point, seed: int) -> dict[str, Any]:
        method = methods()[point.method]
        flags = {**method.settings, **method.strengths[point.strength]}
        if any(name.startswith("forgetting") for name in flags):
            flags["forgetting.artifact"] = self._artifact(seed, method.order)
            flags["forgetting.probe"] = draccus.encode(self.subspaces(seed)[0].probe)
        return flags

    def _replayed(self, point: Point, seed: int) -> dict[str, Any]:
        """The flags of the closed loop's run that `point` is named after, with its gains."""
        closed = replayed(point)
        training = self.training(closed, seed)
        thermostat, metrics = thermostat_of(training), read_jsonl(training.run_directory / "metrics.jsonl")
        strengths = trace(metrics, thermostat, training.training.steps)
        control = controls(strengths, thermostat, seed)[str(methods()[point.method].replays)]
        flags = {n: v for n, v in self._flags(closed, seed).items() if not n.startswith("forgetting.thermostat")}
        return {**flags, "forgetting.thermostat": draccus.encode(control)}

    def second_subspaces(self, point: Point, seed: int) -> SubspacesConfig:
        """ICSM of the policy at a point, from which the second new task is learned."""
        fast = {"icsm.scoring": "fisher"}  # ranks directions as injection does, in a fraction of the time
        name = f"{self._artifact(seed, point.method)}_second"
        return self._subspaces(self.policy(point, seed), name, fast)

    def second_arguments(self, point: Point, seed: int) -> list[str]:
        """`ray_jobs.train` for the second new task, from the policy at a point and by its method."""
        second = {"start_from": self.policy(point, seed), "data.dataset": self._second_task.dataset}
        flags = {**self._flags(point, seed), **second}
        if "forgetting.artifact" in flags:
            flags["forgetting.artifact"] = self.second_subspaces(point, seed).name
        return self._fine_tuning(f"second-{_run_name(point)}", seed, **flags)

    def training(self, point: Point, seed: int) -> ExperimentConfig:
        return parse(ExperimentConfig, self.arguments(point, seed))

    def policy(self, point: Point, seed: int) -> Path:
        """Where a point's policy lies; that of an interpolation is made from its `source`."""
        step = f"step_{point.checkpoint:06d}"
        if methods()[point.method].interpolates:
            return self.directory / f"seed{seed}-{_run_name(point)}" / step / "policy"
        return self.training(point, seed).run_directory / "trainer" / step / "policy"

    def source(self, point: Point) -> Point:
        """The trained point that an interpolated one is mixed from, or the point itself."""
        method = methods()[point.method]
        if method.interpolates is None:
            return point
        return Point(method.interpolates, method.strengths[point.strength]["strength"], point.checkpoint)

    def points(self, name: str) -> tuple[Point, ...]:
        """Every point of a method: all strengths at all checkpoints, strengths first."""
        first = Point(name, next(iter(methods()[name].strengths)), 1)
        training = self.training(self.source(first), self.training_seeds[0]).training
        steps = range(training.checkpoint_every, training.steps + 1, training.checkpoint_every)
        return tuple(Point(name, strength, step) for strength in methods()[name].strengths for step in steps)

    @property
    def new_tasks(self) -> tuple[str, ...]:
        """Those outside the base policy's pretraining."""
        pretrained = self.collected("collect_pretraining").demonstrations
        return tuple(task for task in self.success(self.training_seeds[0]).episodes if task not in pretrained)

    def skills(self, new: bool) -> dict[str, Skill]:
        """The tasks that are played, the new one's or the old ones'."""
        config = self.success(self.training_seeds[0])
        suite = load_suite(config.suite, self.cache)
        tasks = [suite.task(name) for name in config.episodes if (name in self.new_tasks) == new]
        return {task.name: Skill(task.family, task.chance) for task in tasks}

    def success(self, seed: int) -> SuccessConfig:
        """The layouts on which this seed's policies are played, the same for all of them."""
        preset = "tune" if self.tune and not self.quick else "evaluate"
        return self.evaluate_config(preset, ["any"], seed).success

    def sequence_success(self, seed: int) -> SuccessConfig:
        """The layouts on which policies of the sequence are played."""
        return self.evaluate_config("sequence", ["any"], seed).success

    @property
    def sequence_names(self) -> tuple[str, ...]:
        """Methods that learn a second task: none while points are chosen, and none in small."""
        return tuple(name for name in self.names if methods()[name].sequence and not (self.tune or self.quick))

    @property
    def sequence_chance(self) -> dict[str, float]:
        """The sequence's tasks with their chance: all old skills count as one, the first."""
        suite = load_suite("recall", self.cache)
        old = float(np.mean([skill.chance for skill in self.skills(new=False).values()]))
        new = (self.new_tasks[0], next(iter(self._second_task.demonstrations)))
        return {"old skills": old, **{task: suite.task(task).chance for task in new}}

    def sequence_scores(self, table: SuccessTable) -> FloatArray:
        """float64 [3]: success on the sequence's tasks, of old skills as everywhere in this study."""
        _, *new_tasks = self.sequence_chance
        played = Played.of(table.results, new_tasks)
        rates = [np.mean(list(played.new[task].values())) for task in new_tasks]
        return np.array([success(played.old, self.skills(new=False)), *rates], np.float64)

    def question_chance(self, seed: int) -> float:
        """Share of a seed's questions that the most frequent answers get right."""
        records = self.readings(seed).questions.build(self.cache)
        return tabulate(records, np.zeros(len(records), np.bool_))[-1].chance

    @property
    def any_choice(self) -> Choice:
        """Each method's first strength at its last checkpoint, where nothing was tuned."""
        first = {name: next(iter(methods()[name].strengths)) for name in self.trained}
        last = {name: [p for p in self.points(name) if p.strength == first[name]][-1:] for name in first}
        return Choice({name: tuple(points) for name, points in last.items()}, dict.fromkeys(first, 0.0))

    @property
    def recipe(self) -> Figures:
        """All that two runs must share for their seeds to be counted together."""
        seed = 0
        success = self.success(seed)
        trainings = {"base": self.base_arguments(seed), "fine_tuning": self._fine_tuning("any", seed)}
        recipe = {
            "suite_version": load_suite(success.suite, self.cache).version,
            "demonstrations": {config.dataset: config.demonstrations for config in self.collections},
            "subspaces": {n: draccus.encode(getattr(self.subspaces(seed)[0], n)) for n in ("probe", "icsm")},
            "methods": {name: asdict(methods()[name]) for name in self.names},
            "episodes_per_seed": success.episodes,
            "first_layout": success.first_layout,
        }
        for name, flags in trainings.items():
            training = parse(ExperimentConfig, flags)
            recipe[name] = {of: draccus.encode(getattr(training, of)) for of in RECIPE}
        return as_json(recipe)

    @property
    def _second_task(self) -> CollectConfig:
        return self.collected("collect_second_task")

    def _fine_tuning(self, name: str, seed: int, **values: Any) -> list[str]:
        return self.run_arguments(self.preset("train" if self.quick else "../baseline_lora"), name, seed, **values)

    def _artifact(self, seed: int, order: str) -> str:
        return f"{self.study}_seed{seed}_{order}"


def replay_of(closed: Point, method: str) -> Point:
    """The point at which `method` replays a closed loop's run."""
    return Point(method, f"{closed.method}: {closed.strength}", closed.checkpoint)


def replayed(point: Point) -> Point:
    """The closed loop's point behind `replay_of`."""
    method, _, strength = point.strength.partition(": ")
    return Point(method, strength, point.checkpoint)


def _run_name(point: Point) -> str:
    return re.sub("[^a-z0-9.-]+", "_", f"{point.method}-{point.strength}")


@dataclass(frozen=True)
class Plan:
    """What is reported, given what tuning chose: the points to play and who is compared with whom.

    Attributes:
        points: those of closed loops before those that replay them.
        entries: every method, in the tables' order.
        ours: of our methods the one with the largest area on the tuning seed.
        loop: of `evaluators.tradeoffs.LOOPS`, the method that is it; empty without a closed loop.
    """

    points: tuple[Point, ...]
    entries: Mapping[str, Entry]
    ours: str
    loop: Mapping[str, str]

    @classmethod
    def of(cls, study: ForgettingStudy, choice: Choice) -> Plan:
        """For the methods of the study. ValueError if none of them is ours."""
        ours = [name for name in study.trained if methods()[name].role == "ours"]
        if not ours:
            raise ValueError(f"methods is {list(study.names)}; name one of ours too")
        points = [point for name in study.trained for point in choice.points[name]]
        final = {name: choice.final(name) for name in study.trained}
        loop: dict[str, str] = {}
        if closed := [name for name in ours if methods()[name].constant]:
            best = choice.best(closed)
            run_ = [point for point in choice.points[best] if point.strength == final[best].strength]
            for name in study.names:
                if replays := methods()[name].replays:
                    points += [replay_of(point, name) for point in run_]
                    final[name] = replay_of(final[best], name)
                    loop[replays] = name
            constant = methods()[best].constant
            if loop:
                loop = {"closed": best, **loop, **({"constant": constant} if constant in final else {})}
        named = {name: Entry(methods()[name].role, at, methods()[name].uses) for name, at in final.items()}
        return cls(tuple(points), named, choice.best(ours), loop)


class ForgettingRunner(Runner):
    """The stages, each of which does what is missing; Ray must be connected."""

    def __init__(self, study: ForgettingStudy, console: Console) -> None:
        super().__init__(study.directory, console)
        self.study = study

    def prepare(self, seed: int) -> None:
        """Demonstrations, this seed's base policy and its subspaces, made where they are missing."""
        self.collect(self.study.collections)
        self.train(f"seed {seed}: base policy", {f"seed {seed}, base": self.study.base_arguments(seed)})
        self._find_missing(f"seed {seed}: subspaces", self.study.subspaces(seed))

    def play_points(self, points: Sequence[Point], seed: int) -> tuple[Played, dict[Point, Played]]:
        """Everything of one seed: its base policy and these points of its methods, made where missing, played."""
        study = self.study
        self.prepare(seed)
        self._fine_tune(points, seed)
        policies = {"base": study.base(seed), **{str(p): study.policy(p, seed) for p in points}}
        readings: dict[str, Readings] = {}
        if not study.tune:  # points are chosen by success alone
            config = study.readings(seed)
            config.questions.build(study.cache)  # once, before two processes would
            calls = [(config, policy, study.probes, study.cache) for policy in policies.values()]
            read_out = self.together(f"seed {seed}: {len(policies)} policies read", read, calls)
            readings = dict(zip(policies, read_out, strict=True))
        title = f"seed {seed}: {len(policies)} policies on held-out layouts"
        purpose = "tuning" if study.tune else "reported"  # whose journals lie apart
        played = {}
        for name, table in self.play(title, policies, study.success(seed), study.cache, purpose).items():
            known = readings.get(name)
            taken = (known.questions, known.kl, known.drift) if known else ()
            played[name] = Played.of(table.results, study.new_tasks, *taken)
        return played["base"], {point: played[str(point)] for point in points}

    def sequence(self, points: Sequence[Point], seed: int) -> dict[str, dict[int, SequenceRun]]:
        """From these points, which were played, on to a second new task: method -> R over old, first, second."""
        study = self.study
        subspaces = [study.second_subspaces(point, seed) for point in points]
        self._find_missing(f"seed {seed}: subspaces of {len(points)} policies", subspaces)
        runs = {f"seed {seed}, second, {p.method}": study.second_arguments(p, seed) for p in points}
        self.train(f"seed {seed}: {len(points)} policies learn a second task", runs)
        policies = {"base": study.base(seed)}
        for point in points:
            policies[f"{point.method} after one"] = study.policy(point, seed)
            second = parse(ExperimentConfig, study.second_arguments(point, seed))
            policies[f"{point.method} after two"] = second.run_directory / "policy"
        title = f"seed {seed}: the sequence"
        tables = self.play(title, policies, study.sequence_success(seed), study.cache, "sequence")
        scores = {name: study.sequence_scores(table) for name, table in tables.items()}
        stages = {p.method: ("base", f"{p.method} after one", f"{p.method} after two") for p in points}
        return {
            name: {seed: SequenceRun(np.stack([scores[stage] for stage in of]))} for name, of in stages.items()
        }

    def step_response(self, closed: Point, seed: int) -> Figures:
        """How this closed loop, what replays it, and constant gains answer to a step; the plot shows this seed."""
        config, plan = self.study.training(closed, seed), StepConfig()
        place = self.study.directory / f"seed{seed}-response"

        def answers(arms: Mapping[str, ExperimentConfig]) -> dict[str, list[Line]]:
            calls = [(arm, plan, place / f"{name}.json") for name, arm in arms.items()]
            return dict(zip(arms, self.together(f"seed {seed}: step response", respond, calls), strict=True))

        write_conflicting(config.datasets, plan)
        lines = answers(plan.arms(config))
        lines |= answers(plan.controls(config, lines[CLOSED], seed))
        if self.study.complete:
            plot_response(lines, plan, DOCS / "forgetting_step.png")
        responses = {arm: response(log, plan, thermostat_of(config)) for arm, log in lines.items()}
        return response_figures(closed.method, {seed: responses})

    def costs(self, method: Point, regulated: Point, seed: int) -> Figures:
        """What a training step costs with one point's method, and with the other one's Thermostat on top."""
        recorded = self.study.directory / "costs.json"
        if not recorded.exists():
            config, thermostat = (self.study.training(point, seed) for point in (method, regulated))
            assert config.forgetting is not None
            both = replace(config.forgetting, thermostat=thermostat_of(thermostat))
            with self.stage("costs"):
                costs = step_costs(replace(config, forgetting=both), StepCostConfig())
            write_text(recorded, json.dumps(costs))
        costs_read: Figures = json.loads(recorded.read_text())
        return costs_read

    def _fine_tune(self, points: Sequence[Point], seed: int) -> None:
        """Runs that replay another's gains come after it."""
        study = self.study
        sources = list(dict.fromkeys(study.source(point) for point in points))
        for replays in (False, True):
            some = [p for p in sources if bool(methods()[p.method].replays) == replays]
            runs = {f"seed {seed}, {p.method} {p.strength}": study.arguments(p, seed) for p in some}
            self.train(f"seed {seed}: {len(runs)} fine-tunings", runs)
        for point in points:
            method, out = methods()[point.method], study.policy(point, seed)
            if method.interpolates and not (out / "policy.json").exists():
                tuned = study.policy(study.source(point), seed)
                interpolate(study.base(seed), tuned, method.strengths[point.strength]["coefficient"]).save(out)

    def _find_missing(self, title: str, configs: Sequence[SubspacesConfig]) -> None:
        """Side by side: each reads its teacher in a process of its own."""
        places = [(config, config.artifacts / str(config.name)) for config in configs]
        missing = [(config, place) for config, place in places if not (place / "meta.json").exists()]
        self.together(title, read_teacher, missing)


def tune(runner: ForgettingRunner) -> None:
    """Plays every point of every method on the tuning seed, and writes down which are to be reported."""
    study = runner.study
    points = [point for name in study.trained for point in study.points(name)]
    _, played = runner.play_points(points, study.tuning_seed)
    choice = choose(played, study.skills(new=True), study.skills(new=False))
    for name, chosen in choice.points.items():
        places = "; ".join(f"{point.strength} at {point.checkpoint}" for point in chosen)
        runner.console.print(f"{name}: area {choice.areas[name]:.3f}, {places}")
    if study.complete:
        tried = [{**asdict(point), "new": _counts(p.new), "old": _counts(p.old)} for point, p in played.items()]
        tuning = {"choice": asdict(choice), "tried": tried}
        runner.console.print(f"written to {write_record(_TUNING, [study.tuning_seed], tuning, [])}")


def _counts(outcomes: Outcomes) -> dict[str, str]:
    return {task: f"{sum(layouts.values())}/{len(layouts)}" for task, layouts in outcomes.items()}


def read_choice() -> Choice:
    """What `tune` wrote. ValueError if nothing was chosen yet."""
    record = read_record(_TUNING)
    if record is None:
        raise ValueError("no points have been chosen yet; run python -m studies.forgetting --tune true first")
    return Choice.from_dict(record["figures"]["choice"])


def report(runner: ForgettingRunner) -> None:
    """Plays the chosen points, and publishes after every seed, so that none is lost."""
    study = runner.study
    choice = study.any_choice if study.quick else read_choice()
    plan = Plan.of(study, choice)
    for seed in study.training_seeds:
        base, played = runner.play_points(plan.points, seed)
        comparison = Comparison(
            new=study.skills(new=True),
            old=study.skills(new=False),
            methods=plan.entries,
            base={seed: base},
            points={point: {seed: policy} for point, policy in played.items()},
            ours=plan.ours,
            loop=plan.loop,
            question_chance=study.question_chance(seed) if base.accuracy is not None else None,
        )
        results = figures(comparison, 20 if study.quick else 2000) | {"recipe": study.recipe}
        if study.sequence_names and seed in study.sequence_seeds:
            runs = runner.sequence([choice.final(name) for name in study.sequence_names], seed)
            results["sequence"] = sequence_figures(study.sequence_chance, runs)
        if not study.quick:
            results["costs"] = runner.costs(study.points("hsw")[0], study.points("hsw_thermostat")[0], seed)
            if plan.loop:
                results["response"] = runner.step_response(plan.entries[plan.loop["closed"]].final, seed)
        if study.complete:
            results = publish("forgetting", [seed], results, joined, targets, runner.console)
            plot_fronts(results, DOCS / "forgetting.png")
        for table in measured(results, FORGETTING):
            runner.console.print(Markdown(table))


def main(study: ForgettingStudy) -> None:
    """Chooses or reports."""
    with placed(study, study.quick) as here, connect(here):
        (tune if here.tune else report)(ForgettingRunner(here, Console()))


if __name__ == "__main__":
    run(ForgettingStudy, main, __doc__)
