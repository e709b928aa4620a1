"""The memory benchmark's study: which runs there are, what each is configured as, and where it lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draccus

from ipvla.choices import did_you_mean
from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import NoMemoryConfig, PromptMemoryConfig
from ipvla.policy import Policy
from ipvla.storage import SOURCE_TREE, StorageRoots
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig

_PRESETS = SOURCE_TREE / "ray_jobs" / "experiments" / "memory"
_QUICK = ("prompt",)
#: Held-out layouts from one seed's slice to the next one's.
_SLICE = 1000


def mechanisms() -> Mapping[str, Mapping[str, Any]]:
    """Name in the tables -> settings of `model.memory`, in the tables' order."""
    path = _PRESETS / "mechanisms.yaml"
    with path.open() as file:
        named: Mapping[str, Mapping[str, Any]] = draccus.cfgparsing.load_config(file, file=str(path))
    return named


@dataclass(frozen=True)
class MemoryStudy(StorageRoots):
    """What is compared.

    Attributes:
        quick: everything in small, in a temporary place unless a storage root is given; results mean nothing.
        mechanisms: names of `ray_jobs/experiments/memory/mechanisms.yaml`; empty for all, or one if quick.
        seeds: of the training runs; each has its own starting policy and its own held-out layouts.
    """

    quick: bool = False
    mechanisms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        known = mechanisms()
        for name in self.mechanisms:
            if name not in known:
                raise ValueError(f"mechanisms: {name!r} is unknown; {did_you_mean(name, known)}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; give at least one, all different and 0 or more")

    @property
    def study(self) -> str:
        return "memory-quick" if self.quick else "memory"

    @property
    def directory(self) -> Path:
        return self.runs / self.study

    @property
    def names(self) -> tuple[str, ...]:
        """The mechanisms that are compared, in the tables' order."""
        return tuple(n for n in mechanisms() if n in (self.mechanisms or (_QUICK if self.quick else mechanisms())))

    @property
    def training_seeds(self) -> tuple[int, ...]:
        return self.seeds[:1] if self.quick else self.seeds

    @property
    def complete(self) -> bool:
        """Does this say something of every mechanism, as the published tables do?"""
        return not self.quick and self.names == tuple(mechanisms())

    @property
    def collection(self) -> CollectConfig:
        return parse(CollectConfig, self._preset("collect"))

    def start_arguments(self, seed: int) -> list[str]:
        """`ray_jobs.train` for the policy that all of this seed's mechanisms start from."""
        return self._run_arguments("pretrain", f"seed{seed}-start", seed)

    def arguments(self, mechanism: str, seed: int) -> list[str]:
        """`ray_jobs.train` for one cell; cells of a seed differ in name and `model.memory` alone."""
        memory = ["--model.memory", json.dumps(mechanisms()[mechanism])]
        start = ["--start_from", str(self.bare_start(seed))]
        return [*self._run_arguments("train", run_name(mechanism, seed), seed), *memory, *start]

    def training(self, mechanism: str, seed: int) -> ExperimentConfig:
        return parse(ExperimentConfig, self.arguments(mechanism, seed))

    def start(self, seed: int) -> ExperimentConfig:
        return parse(ExperimentConfig, self.start_arguments(seed))

    def policy(self, mechanism: str, seed: int) -> Path:
        """Where a cell's policy lies."""
        return self.directory / run_name(mechanism, seed) / "policy"

    def bare_start(self, seed: int) -> Path:
        """Where a seed's starting policy lies once its memory is dropped."""
        return self.directory / f"seed{seed}-start" / "without_memory"

    def evaluation(self, seed: int) -> EvaluateConfig:
        """All mechanisms of a seed on the seed's own held-out layouts."""
        policies = [run_name(mechanism, seed) for mechanism in self.names]
        return self._on_layouts("evaluate", policies, seed)

    def plan(self, seed: int) -> EvaluateConfig:
        """The layouts on which reasoning once and at every step are compared."""
        return self._on_layouts("plan", [run_name("prompt", seed)], seed)

    def _on_layouts(self, preset: str, policies: list[str], seed: int) -> EvaluateConfig:
        arguments = ["--study", self.study, "--policies", json.dumps(policies), "--videos", "0"]
        config = parse(EvaluateConfig, [*self._preset(preset), *arguments])
        first = config.success.first_layout + _SLICE * seed
        return replace(config, success=replace(config.success, first_layout=first))

    def _run_arguments(self, preset: str, name: str, seed: int) -> list[str]:
        names = ["--study", self.study, "--name", name]
        return [*self._preset(preset), *names, "--seed", str(seed), "--lanes.seed", str(seed)]

    def _preset(self, name: str) -> list[str]:
        path = _PRESETS / ("quick" if self.quick else "") / f"{name}.yaml"
        flags = [part for flag, directory in self.directories.items() for part in (f"--{flag}", str(directory))]
        return ["--config_path", str(path), *flags]


def run_name(mechanism: str, seed: int) -> str:
    """Of a cell, below the study's directory."""
    return f"seed{seed}-{mechanism}"


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
            raise ValueError(
                f"{once} holds a policy with {type(memory).__name__}; give one with memory.type prompt"
            )
        config = replace(policy.config, memory=replace(memory, refresh=1))
        Policy.build(config, policy.transforms.conventions, policy.execute, policy.model).save(every)
