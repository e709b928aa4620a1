"""The forgetting benchmark's study: which runs there are, what each is configured as, and where it lies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import draccus
import numpy as np

from benchmarks.forgetting_choice import Choice, success
from benchmarks.forgetting_loop import controls, trace
from benchmarks.forgetting_outcomes import Played, Point, Skill
from benchmarks.forgetting_readings import ReadingsConfig
from evaluators.forgetting import FloatArray
from evaluators.grounding import GroundingConfig, tabulate
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.choices import did_you_mean
from ipvla.experiment import ExperimentConfig
from ipvla.sim.suites import load_suite
from ipvla.storage import SOURCE_TREE, StorageRoots
from ipvla.tracking import read_jsonl
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.evaluate import EvaluateConfig
from ray_jobs.subspaces import SubspacesConfig

_EXPERIMENTS = SOURCE_TREE / "ray_jobs" / "experiments"
_PRESETS = _EXPERIMENTS / "forgetting"
#: Held-out layouts from one seed's slice to the next one's.
_SLICE = 1000
#: Pictures that questions are about.
_ASKED = ("ground_red", "recall", "place")
#: Parts of the base's and of the fine-tunings' settings that belong to a recipe.
_RECIPE = ("lanes", "model", "optimizer", "training", "num_workers")


@dataclass(frozen=True)
class Method:
    """One way to fine-tune, as `ray_jobs/experiments/forgetting/methods.yaml` has it.

    Attributes:
        role: of `forgetting_outcomes.ROLES`.
        strengths: name -> flags of `ray_jobs.train` over `settings`; every method tries as many. Of a method that
            interpolates: {"strength": of the trained method, "coefficient": in [0, 1]}.
        settings: flags over those of `baseline_lora.yaml`.
        uses: of `forgetting_outcomes.USES`.
        order: of ICSM's directions.
        interpolates: the method whose policies are mixed with the base, instead of a training.
        replays: "shuffled" or "mean": the gains are those of a closed loop's run (`forgetting_loop.controls`). Its
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
    path = _PRESETS / "methods.yaml"
    with path.open() as file:
        named = draccus.cfgparsing.load_config(file, file=str(path))
    return {name: Method(**{**given, "uses": tuple(given.get("uses", ()))}) for name, given in named.items()}


@dataclass(frozen=True)
class ForgettingStudy(StorageRoots):
    """What is compared.

    Attributes:
        quick: everything in small, in a temporary place unless a storage root is given; results mean nothing.
        tune: play every point of every method on the tuning seed and choose, instead of reporting.
        methods: names of `methods.yaml`; empty for all, or two if quick.
        seeds: of base policies and fine-tunings; each has its own held-out layouts.
        sequence_seeds: those of them whose policies go on to a second new task.
        tuning_seed: none of `seeds`.
    """

    quick: bool = False
    tune: bool = False
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sequence_seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in methods():
                raise ValueError(f"methods: {name!r} is unknown; {did_you_mean(name, methods())}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; give at least one, all different and 0 or more")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} is among the seeds; choose on another one")

    @property
    def study(self) -> str:
        return "forgetting-quick" if self.quick else "forgetting"

    @property
    def directory(self) -> Path:
        return self.runs / self.study

    @property
    def names(self) -> tuple[str, ...]:
        """The methods that are compared, in the tables' order."""
        wanted = self.methods or (("lora", "hsw_thermostat") if self.quick else tuple(methods()))
        return tuple(name for name in methods() if name in wanted)

    @property
    def training_seeds(self) -> tuple[int, ...]:
        if self.tune:
            return (self.tuning_seed,)
        return self.seeds[:1] if self.quick else self.seeds

    @property
    def complete(self) -> bool:
        """Does this say something of every method, as the published tables do?"""
        return not self.quick and self.names == tuple(methods())

    @property
    def collections(self) -> tuple[CollectConfig, ...]:
        """The demonstrations that these methods need, and the probe's episodes."""
        named = ["pretraining", "new_task"]
        if any("replay" in methods()[name].uses for name in self.names):
            named.append("replay")
        if self.sequence_names:
            named.append("second_task")
        probe = parse(CollectConfig, self._preset("collect_probe"))
        return *map(self._collected, named), replace(probe, data_root_dir=self.probes)

    def base_arguments(self, seed: int) -> list[str]:
        """`ray_jobs.train` for the policy that all of this seed's methods start from."""
        return [*self._preset("pretrain"), *self._run_flags("base", seed)]

    def base(self, seed: int) -> Path:
        """Where this seed's base policy lies."""
        return self.base_training(seed).run_directory / "policy"

    def base_training(self, seed: int) -> ExperimentConfig:
        return parse(ExperimentConfig, self.base_arguments(seed))

    def subspaces(self, seed: int) -> tuple[SubspacesConfig, ...]:
        """ICSM of a seed's base policy, in every order of directions that a method takes.

        In the controls' orders these are directions alone; the first one has all that methods read.
        """
        orders = dict.fromkeys(["sensitivity", *(methods()[name].order for name in self.names)])
        found = []
        for order in orders:
            flags = {"teacher": self.base(seed), "name": self._artifact(seed, order), "icsm.order": order}
            config = parse(SubspacesConfig, [*self._preset("subspaces"), *arguments(flags)])
            found.append(config if order == "sensitivity" else replace(config, fisher=None, adapters=None))
        return tuple(found)

    def readings(self, seed: int) -> ReadingsConfig:
        """What is read of a seed's policies without a simulator."""
        subspaces = self.subspaces(seed)[0]
        artifact = subspaces.artifacts / self._artifact(seed, "sensitivity")
        first = GroundingConfig().first_layout + _SLICE * seed
        questions = GroundingConfig(tasks=_ASKED, episodes=2 if self.quick else 15, first_layout=first)
        return ReadingsConfig(self.base(seed), artifact, subspaces.probe, questions)

    def arguments(self, point: Point, seed: int) -> list[str]:
        """`ray_jobs.train` for one cell; those of a seed differ in what `methods.yaml` says of them alone."""
        method = methods()[point.method]
        flags = self._replayed(point, seed) if method.replays else self._flags(point, seed)
        start = {"start_from": self.base(seed)}
        return [*self._fine_tuning, *self._run_flags(_run_name(point), seed), *arguments({**start, **flags})]

    def _flags(self, point: Point, seed: int) -> dict[str, Any]:
        method = methods()[point.method]
        flags = {**method.settings, **method.strengths[point.strength]}
        if any(name.startswith("forgetting") for name in flags):
            flags["forgetting.artifact"] = self._artifact(seed, method.order)
            flags["forgetting.probe"] = draccus.encode(self.subspaces(seed)[0].probe)
        return flags

    def _replayed(self, point: Point, seed: int) -> dict[str, Any]:
        """The flags of the closed loop's run that `point` is named after, with the gains that it found."""
        closed = replayed(point)
        training = self.training(closed, seed)
        assert training.forgetting is not None
        thermostat, steps = training.forgetting.thermostat, training.training.steps
        assert thermostat is not None
        strengths = trace(read_jsonl(training.run_directory / "metrics.jsonl"), thermostat, steps)
        kind = methods()[point.method].replays
        control = controls(strengths, thermostat, seed)[str(kind)]
        flags = {n: v for n, v in self._flags(closed, seed).items() if not n.startswith("forgetting.thermostat")}
        return {**flags, "forgetting.thermostat": draccus.encode(control)}

    def second_subspaces(self, point: Point, seed: int) -> SubspacesConfig:
        """ICSM of the policy at a point, from which the second new task is learned."""
        flags = {
            "teacher": self.policy(point, seed),
            "name": f"{self._artifact(seed, point.method)}_second",
            "icsm.scoring": "fisher",  # ranks directions as injection does, in a fraction of the time
        }
        return parse(SubspacesConfig, [*self._preset("subspaces"), *arguments(flags)])

    def second_arguments(self, point: Point, seed: int) -> list[str]:
        """`ray_jobs.train` for the second new task, from the policy at a point and by its method."""
        flags = {
            **self._flags(point, seed),
            "start_from": self.policy(point, seed),
            "data.dataset": self._collected("second_task").dataset,
        }
        if "forgetting.artifact" in flags:
            flags["forgetting.artifact"] = self.second_subspaces(point, seed).name
        return [*self._fine_tuning, *self._run_flags(f"second-{_run_name(point)}", seed), *arguments(flags)]

    def second_policy(self, point: Point, seed: int) -> Path:
        """Where the policy that has learned both tasks lies."""
        return self.second_training(point, seed).run_directory / "policy"

    def second_training(self, point: Point, seed: int) -> ExperimentConfig:
        return parse(ExperimentConfig, self.second_arguments(point, seed))

    def training(self, point: Point, seed: int) -> ExperimentConfig:
        return parse(ExperimentConfig, self.arguments(point, seed))

    def policy(self, point: Point, seed: int) -> Path:
        """Where a point's policy lies; that of an interpolation is made from `sources`."""
        if methods()[point.method].interpolates:
            return self.directory / f"seed{seed}-{_run_name(point)}" / f"step_{point.checkpoint:06d}" / "policy"
        return self.training(point, seed).run_directory / "trainer" / f"step_{point.checkpoint:06d}" / "policy"

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
        """Those that the base policy has never seen."""
        seen = self._collected("pretraining").demonstrations
        return tuple(task for task in self.success(self.training_seeds[0]).episodes if task not in seen)

    @property
    def purpose(self) -> str:
        """Of what is played: journals of tuning and reporting lie apart."""
        return "tuning" if self.tune else "reported"

    def skills(self, new: bool) -> dict[str, Skill]:
        """The tasks that are played, the new one's or the old ones'."""
        config = self.success(self.training_seeds[0])
        suite = load_suite(config.suite, self.cache)
        tasks = [suite.task(name) for name in config.episodes if (name in self.new_tasks) == new]
        return {task.name: Skill(task.family, task.chance) for task in tasks}

    def sequence_success(self, seed: int) -> SuccessConfig:
        """The layouts on which policies of the sequence are played."""
        config = parse(EvaluateConfig, [*self._preset("sequence"), "--policies", '["any"]']).success
        return replace(config, first_layout=config.first_layout + _SLICE * seed)

    @property
    def sequence_names(self) -> tuple[str, ...]:
        """Methods that learn a second task: none while points are chosen, and none in small."""
        return tuple(name for name in self.names if methods()[name].sequence and not (self.tune or self.quick))

    @property
    def sequence_chance(self) -> dict[str, float]:
        """The sequence's tasks with their chance: all old skills count as one, the first."""
        suite = load_suite("recall", self.cache)
        old = [skill.chance for skill in self.skills(new=False).values()]
        second = next(iter(self._collected("second_task").demonstrations))
        first = self.new_tasks[0]
        return {
            "old skills": float(np.mean(old)),
            first: suite.task(first).chance,
            second: suite.task(second).chance,
        }

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
        trained = [name for name in self.names if not methods()[name].replays]
        return Choice({name: (self._last(name),) for name in trained}, dict.fromkeys(trained, 0.0))

    @property
    def recipe(self) -> dict[str, Any]:
        """All that two runs must share for their seeds to be counted together."""
        seed = 0
        fine_tuning = parse(ExperimentConfig, [*self._fine_tuning, *self._run_flags("any", seed)])
        base = parse(ExperimentConfig, self.base_arguments(seed))
        success = self.success(seed)
        told = {
            "suite_version": load_suite(success.suite, self.cache).version,
            "demonstrations": {config.dataset: config.demonstrations for config in self.collections},
            "base": {name: draccus.encode(getattr(base, name)) for name in _RECIPE},
            "fine_tuning": {name: draccus.encode(getattr(fine_tuning, name)) for name in _RECIPE},
            "subspaces": {n: draccus.encode(getattr(self.subspaces(seed)[0], n)) for n in ("probe", "icsm")},
            "methods": {name: asdict(methods()[name]) for name in self.names},
            "episodes_per_seed": success.episodes,
            "first_layout": success.first_layout,
        }
        as_recorded: dict[str, Any] = json.loads(json.dumps(told))
        return as_recorded

    def _last(self, name: str) -> Point:
        strengths = list(methods()[name].strengths)
        return next(p for p in reversed(self.points(name)) if p.strength == strengths[0])

    def success(self, seed: int) -> SuccessConfig:
        """The layouts on which this seed's policies are played, the same for all of them."""
        preset = "tune" if self.tune and not self.quick else "evaluate"
        config = parse(EvaluateConfig, [*self._preset(preset), "--policies", '["any"]']).success
        return replace(config, first_layout=config.first_layout + _SLICE * seed)

    def _collected(self, name: str) -> CollectConfig:
        return parse(CollectConfig, self._preset(f"collect_{name}"))

    @property
    def _fine_tuning(self) -> list[str]:
        return self._preset("train" if self.quick else "../baseline_lora")

    def _artifact(self, seed: int, order: str) -> str:
        return f"{self.study}_seed{seed}_{order}"

    def _run_flags(self, name: str, seed: int) -> list[str]:
        names = {"study": self.study, "name": f"seed{seed}-{name}", "seed": seed, "lanes.seed": seed}
        return arguments(names)

    def _preset(self, name: str) -> list[str]:
        path = _PRESETS / ("quick" if self.quick else "") / f"{name}.yaml"
        return ["--config_path", str(path), *arguments(self.directories)]


def same_recipe(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    """Whether two recipes are one; a setting that has come since `earlier` was written had its default then."""
    return _completed(earlier) == _completed(later)


def _completed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of settings that it does not know."""
    told = dict(recipe)
    for part in {"base", "fine_tuning"} & set(recipe):
        settings = json.loads(json.dumps(draccus.encode(draccus.decode(ExperimentConfig, recipe[part]))))
        told[part] = {name: settings[name] for name in _RECIPE}
    return told


def replay_of(closed: Point, method: str) -> Point:
    """The point at which `method` replays a closed loop's run."""
    return Point(method, f"{closed.method}: {closed.strength}", closed.checkpoint)


def replayed(point: Point) -> Point:
    """The closed loop's point behind `replay_of`."""
    method, _, strength = point.strength.partition(": ")
    return Point(method, strength, point.checkpoint)


def _run_name(point: Point) -> str:
    return re.sub("[^a-z0-9.-]+", "_", f"{point.method}-{point.strength}")
