"""A policy of one LIBERO suite is fine-tuned on another: who learns libero_spatial, who forgets libero_object?

Part `forgetting` of `python -m studies.libero`. Per training seed all methods of `studies/libero_forgetting.yaml`
start from that seed's policy on libero_object, with the same demonstrations in the same order, the same adapters
and the same number of updates, and are played on published initial states of both suites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import draccus
import numpy as np

from evaluators.forgetting import FloatArray, SequenceRun, interval, sequence_figures
from evaluators.intervals import resampled
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable
from ipvla.experiment import ExperimentConfig
from ipvla.storage import SOURCE_TREE
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.evaluate import EvaluateConfig
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from studies.engine import Runner, entries
from studies.record import Figures

#: In the order of training, with the success of a policy that has learned nothing.
SUITES: Final = {"libero_object": 0.0, "libero_spatial": 0.0}
_PRESETS: Final = SOURCE_TREE / "ray_jobs" / "experiments" / "libero" / "forgetting"
_DRAWS: Final = 10_000


@dataclass(frozen=True)
class ForgettingOnLibero:
    """The jobs of one seed.

    Attributes:
        seed: of the fine-tunings.
        base: the policy that they start from.
        directories: flags of the study's storage roots.
        precision: of the fine-tunings.
        quick: two methods in small.
    """

    seed: int
    base: Path
    directories: Mapping[str, Any]
    precision: str = "fp32"
    quick: bool = False

    @property
    def methods(self) -> Mapping[str, Mapping[str, Any]]:
        """Name in the tables -> flags over those of `train.yaml`, in the tables' order."""
        known = entries("libero_forgetting")
        return {name: known[name] for name in ("lora", "input_decay")} if self.quick else known

    def collections(self) -> list[CollectConfig]:
        """The new suite's demonstrations, and the probe: other demonstrations of the old one."""
        probe = parse(CollectConfig, self._preset("probe"))
        return [parse(CollectConfig, self._preset("collect")), replace(probe, data_root_dir=probe.probes)]

    def subspaces(self) -> SubspacesConfig:
        """What the methods know of the base policy."""
        values = {"teacher": self.base, "name": f"{self._study}_seed{self.seed}"}
        return parse(SubspacesConfig, [*self._preset("subspaces"), *arguments(values)])

    def training(self, method: str) -> list[str]:
        """`ray_jobs.train` by a method."""
        flags = dict(self.methods[method])
        if flags:
            subspaces = self.subspaces()
            flags["forgetting.artifact"] = str(subspaces.name)
            flags["forgetting.probe"] = draccus.encode(subspaces.probe)
        names = {"name": f"seed{self.seed}-{method}", "study": self._study, "start_from": self.base}
        seeds = {"seed": self.seed, "lanes.seed": self.seed, "training.precision": self.precision}
        return [*self._preset("train"), *arguments({**names, **seeds, **flags})]

    def policies(self) -> dict[str, Path]:
        """The base and every method's policy."""
        trained = {name: parse(ExperimentConfig, self.training(name)).run_directory for name in self.methods}
        return {"base": self.base, **{name: directory / "policy" for name, directory in trained.items()}}

    def success(self, suite: str) -> SuccessConfig:
        """What is played of a suite."""
        flags = [*self._preset(suite), *arguments({"policies": ["any"]})]
        return parse(EvaluateConfig, flags).success

    @property
    def _study(self) -> str:
        return "libero_forgetting_quick" if self.quick else "libero_forgetting"

    def _preset(self, name: str) -> list[str]:
        directory = _PRESETS / "quick" if self.quick else _PRESETS
        return ["--config_path", str(directory / f"{name}.yaml"), *arguments(self.directories)]


def measure(seeds: Sequence[ForgettingOnLibero], cache: Path, runner: Runner) -> Figures:
    """All stages, of what is missing; the figures."""
    runs: dict[str, dict[int, SequenceRun]] = {}
    counts: dict[str, Any] = {}
    for one in seeds:
        runner.collect(one.collections())
        subspaces = one.subspaces()
        place = subspaces.artifacts / str(subspaces.name)
        if not (place / "meta.json").exists():
            runner.together(f"seed {one.seed}: subspaces", read_teacher, [(subspaces, place)])
        trainings = {f"seed {one.seed}, {name}": one.training(name) for name in one.methods}
        runner.train(f"seed {one.seed}: {len(trainings)} fine-tunings", trainings)
        rates: dict[str, list[float]] = {}
        for suite in SUITES:
            title, purpose = f"seed {one.seed}: {suite}", f"{suite}-forgetting"
            tables = runner.play(title, one.policies(), one.success(suite), cache, purpose)
            for name, table in tables.items():
                k, n = _counted(table)
                counts.setdefault(name, {}).setdefault(str(one.seed), {})[suite] = f"{k}/{n}"
                rates.setdefault(name, []).append(k / n)
        for name in one.methods:
            scores = np.array([rates["base"], rates[name]])
            runs.setdefault(name, {})[one.seed] = SequenceRun(scores)
    figures = sequence_figures(SUITES, runs)
    return {**figures, "counts": counts, "ratios": ratios(runs)}


def ratios(runs: Mapping[str, Mapping[int, SequenceRun]], baseline: str = "lora") -> dict[str, Any]:
    """Method -> what it forgets over what `baseline` forgets, seeds drawn together; null where that is nothing."""
    lost = {name: np.array([_lost(run.scores) for run in of.values()]) for name, of in runs.items()}
    if lost[baseline].mean() <= 0:
        return dict.fromkeys(lost)
    seeds = np.arange(len(lost[baseline]), dtype=np.float64)
    drawn = resampled(seeds, _DRAWS, 0).astype(np.int64)
    below = lost[baseline][drawn].mean(1)
    some = below > 0
    found = {}
    for name, of in lost.items():
        value = float(of.mean() / lost[baseline].mean())
        estimate = interval(value, of[drawn].mean(1)[some] / below[some], len(seeds))
        low, high = (None if np.isnan(end) else end for end in (estimate.low, estimate.high))
        found[name] = {"value": estimate.value, "low": low, "high": high}
    return found


def _lost(scores: FloatArray) -> float:
    return float(scores[0, 0] - scores[1, 0])


def _counted(table: SuccessTable) -> tuple[int, int]:
    (family,) = table.families
    return family.k, family.n
