"""What LIBERO shows, part by part: assets, what a policy learns, what it forgets, and how robust it is.

    python -m studies.libero [--parts "[object]"] [--seeds "[0]"] [--quick]

- assets: both packages' task files and initial states are the same; what a simulator takes.
- object, spatial: from nothing to a policy: demonstrations, trainings, published initial states, protocol `ipvla`.
- forgetting: the policies on libero_object are fine-tuned on libero_spatial (`studies.libero_forgetting`).
- pro, plus: the first seed's policy on libero_object in LIBERO-PRO's 16 suites, and under LIBERO-Plus' dimensions.

Parts after `object` need its policies. Needs the original assets (`make assets`). A full run writes every part to
`benchmarks/results/libero.json` beside what is there of the others; one that was interrupted goes on where it was,
if it gets the same storage root. `--quick` does a little of each part, and its results mean nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from rich.console import Console

from evaluators.intervals import wilson_interval
from ipvla.experiment import ExperimentConfig
from ipvla.sim.standard.tasks import HORIZONS, PRO_ROOT, PRO_SUITES, bddl_file, initial_states, standard_tasks
from ipvla.storage import SOURCE_TREE
from ipvla.training.precision import PRECISIONS
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.robustness import RobustnessConfig
from ray_jobs.robustness import measure as measure_robustness
from ray_jobs.running.cluster import connect
from ray_jobs.train import TrainSummary
from studies.engine import Runner, entries, placed
from studies.expert import suite_figures
from studies.libero_forgetting import ForgettingOnLibero
from studies.libero_forgetting import measure as measure_forgetting
from studies.record import Figures, PartStudy, Target, measure_parts, read_record

_PRESETS: Final = SOURCE_TREE / "ray_jobs" / "experiments" / "libero"
_LEVELS: Final = (1, 3, 5)

_MEASURE = """
import sys
from pathlib import Path
import psutil
from ipvla.sim.suites import load_suite
suite = load_suite("libero_10", Path(sys.argv[1]))
simulator = suite.simulator(suite.tasks[0].name, 256)
simulator.observe()
print(psutil.Process().memory_info().rss / 2**30)
"""


@dataclass(frozen=True)
class LiberoStudy(PartStudy):
    """What is trained and played.

    Attributes:
        seeds: of the trainings.
        states: published initial states per task, of pro and plus.
        correction_rounds: of suites with a preset for them; in each the expert corrects the policy before it.
        precision: of the trainings; bf16 takes .6 of the time on CPUs with AVX512-BF16.
    """

    all_parts: ClassVar[tuple[str, ...]] = ("assets", "object", "spatial", "forgetting", "pro", "plus")
    seeds: tuple[int, ...] = (0, 1, 2)
    states: int = 2
    correction_rounds: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "states")
        self.require_at_least(0, "correction_rounds")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; give at least one, all different")

    @property
    def training_seeds(self) -> tuple[int, ...]:
        return self.seeds[:1] if self.quick else self.seeds

    def preset(self, suite: str, job: str) -> list[str]:
        """The command line of a job by its preset, in this study's directories."""
        path = _PRESETS / suite / ("quick" if self.quick else "")
        return ["--config_path", str(path / f"{job}.yaml"), *arguments(self.directories)]

    def training(self, suite: str, seed: int, corrections: int = 0) -> list[str]:
        """`ray_jobs.train` for one seed's first policy, or on from there after so many rounds of corrections."""
        values: dict[str, Any] = {"name": self.name(seed, corrections), "seed": seed, "lanes.seed": seed}
        values["training.precision"] = self.precision
        if not corrections:
            return [*self.preset(suite, "train"), *arguments(values)]
        again = parse(ExperimentConfig, self.preset(suite, "train_corrections"))
        (first, one), (corrected, share) = again.data.mixture.items()
        rounds = {f"{corrected}_{r}": share / corrections for r in range(1, corrections + 1)}
        values["data.mixture"] = {first: one, **rounds}
        values["start_from"] = self.trained(suite, seed, corrections - 1)
        return [*self.preset(suite, "train_corrections"), *arguments(values)]

    def corrections(self, suite: str, number: int) -> CollectConfig:
        """The round of this number, from 1: of the first seed's policy before it, on layouts of its own."""
        config = parse(CollectConfig, self.preset(suite, "collect_corrections"))
        values: dict[str, Any] = {"dataset": f"{config.dataset}_{number}", "seed": config.seed + number - 1}
        values["learner.policy"] = self.trained(suite, self.training_seeds[0], number - 1)
        return parse(CollectConfig, [*self.preset(suite, "collect_corrections"), *arguments(values)])

    def rounds(self, suite: str) -> int:
        """Of corrections of this suite's policies."""
        if not (_PRESETS / suite / "collect_corrections.yaml").exists():
            return 0
        return 1 if self.quick else self.correction_rounds

    def name(self, seed: int, corrections: int) -> str:
        """Of a run."""
        return f"seed{seed}-corrected{corrections}" if corrections else f"seed{seed}"

    def trained(self, suite: str, seed: int, corrections: int) -> Path:
        """Where the policy after so many rounds lies."""
        run = parse(
            ExperimentConfig, [*self.preset(suite, "train"), *arguments({"name": self.name(seed, corrections)})]
        )
        return run.run_directory / "policy"

    def policy(self, suite: str, seed: int) -> Path:
        """Where the policy lies that is played.

        Raises:
            ValueError: it was not trained yet.
        """
        directory = self.trained(suite, seed, self.rounds(suite))
        if not (directory / "policy.json").exists():
            raise ValueError(f'parts: there is no policy in {directory}; run --parts "[{suite}]" first')
        return directory

    def played(self, suite: str, **changes: Any) -> EvaluateConfig:
        """The evaluation of all seeds' policies."""
        names = {"policies": [self.name(seed, self.rounds(suite)) for seed in self.training_seeds]}
        return parse(EvaluateConfig, [*self.preset(suite, "evaluate"), *arguments({**names, **changes})])


class Parts:
    """Measures them; Ray must be connected."""

    def __init__(self, study: LiberoStudy, console: Console) -> None:
        self._study, self._console = study, console

    def measure(self, part: str) -> Figures:
        """Of one part, what is missing and then the figures."""
        return {
            "assets": self._assets,
            "object": lambda: self._learned("object"),
            "spatial": lambda: self._learned("spatial"),
            "forgetting": self._forgetting,
            "pro": self._pro,
            "plus": self._plus,
        }[part]()

    def _assets(self) -> Figures:
        return {"equal": assets_equal(), "rss_gib_per_simulator": rss_gib(self._study.cache)}

    def _learned(self, suite: str) -> Figures:
        study = self._study
        played = study.played(suite)
        runner = Runner(study.runs / played.study, self._console)
        runner.collect([parse(CollectConfig, study.preset(suite, "collect"))])
        trained: dict[str, TrainSummary] = {}
        for number in range(study.rounds(suite) + 1):
            if number:
                runner.collect([study.corrections(suite, number)])
            runs = {study.name(seed, number): study.training(suite, seed, number) for seed in study.training_seeds}
            trained |= runner.train(f"trainings on {suite}, {number} rounds of corrections", runs)
        with runner.stage("published initial states"):
            tables = evaluate(played, self._console).tables
        rows = [row for table in tables for row in table.families]
        successes, episodes = sum(row.k for row in rows), sum(row.n for row in rows)
        return {
            "success": {table.policy: suite_figures(table)["tasks"] for table in tables},
            "all": {"k": successes, "n": episodes, "wilson95": list(wilson_interval(successes, episodes))},
            "train": {
                name: {"wall_s": summary.wall_s, "loss": summary.final_loss} for name, summary in trained.items()
            },
            "minutes": runner.seconds / 60,
            "protocol": tables[0].fingerprint["protocol"],
            "precision": study.precision,
            "seeds": list(study.training_seeds),
        }

    def _forgetting(self) -> Figures:
        study = self._study
        bases = {seed: study.policy("object", seed) for seed in study.training_seeds}
        settings = study.directories, study.precision, study.quick
        seeds = [ForgettingOnLibero(seed, base, *settings) for seed, base in bases.items()]
        runner = Runner(study.runs / "libero_forgetting", self._console)
        figures = measure_forgetting(seeds, study.cache, runner)
        return {**figures, "precision": study.precision, "minutes": runner.seconds / 60}

    def _pro(self) -> Figures:
        study, seed = self._study, self._study.training_seeds[0]
        policy, own = {f"seed{seed}": study.policy("object", seed)}, study.played("object").success
        runner = Runner(study.runs / "libero_pro", self._console)
        figures: Figures = {}
        for suite in PRO_SUITES[:1] if study.quick else PRO_SUITES:
            tasks = [task.name for task in standard_tasks(suite)][: 1 if study.quick else None]
            success = replace(own, suite=suite, episodes=dict.fromkeys(tasks, study.states))
            (table,) = runner.play(suite, policy, success, study.cache, suite).values()
            figures[suite] = suite_figures(table)["all"]
        return {"suites": figures, "seeds": [seed]}

    def _plus(self) -> Figures:
        study, seed = self._study, self._study.training_seeds[0]
        study.policy("object", seed)
        own = study.played("object", policies=[study.name(seed, study.rounds("object"))])
        few = dict.fromkeys(own.success.episodes, 1 if study.quick else study.states)
        levels = {"levels": list(_LEVELS[:1] if study.quick else _LEVELS), "success.episodes": few}
        flags = arguments({"policies": list(own.policies), **levels})
        config = parse(RobustnessConfig, [*study.preset("object", "evaluate"), *flags])
        (found,) = measure_robustness(config, self._console)
        return {"rows": [row.to_dict() for row in found.rows], "seeds": [seed]}


def assets_equal() -> float:
    """Share of LIBERO's tasks whose task file and initial states are the same in hf-libero and LIBERO-PRO."""
    same = []
    for suite in HORIZONS:
        for task in (task.name for task in standard_tasks(suite)):
            bddl = PRO_ROOT / "bddl_files" / suite / f"{task}.bddl"
            with np.load(PRO_ROOT / "init_files" / suite / f"{task}.pruned_init.npz") as stored:
                equal = np.array_equal(stored["states"], initial_states(suite, task))
            same.append(equal and bddl.read_bytes() == bddl_file(suite, task).read_bytes())
    return sum(same) / len(same)


def rss_gib(cache: Path) -> float:
    """Resident memory of a process with the largest of LIBERO's worlds, original textures."""
    command = [sys.executable, "-c", _MEASURE, str(cache)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def targets(figures: Figures) -> list[Target]:
    """What was aimed at; a part that was not measured meets nothing."""
    assets, forgetting = figures.get("assets", {}), figures.get("forgetting", {})
    aims = [
        Target("assets_equal", assets.get("equal"), 1.0, True),
        Target("rss_gib_per_simulator", assets.get("rss_gib_per_simulator"), 1.6, False),
    ]
    for suite, bound in entries("libero").items():
        of: Mapping[str, Any] | None = figures.get(suite)
        rate = None if of is None else of["all"]["k"] / of["all"]["n"]
        interval = None if of is None else tuple(of["all"]["wilson95"])
        aims.append(Target(f"libero_{suite}_success", rate, bound, True, interval=interval))
    ratio = forgetting.get("ratios", {}).get("input_decay")
    aims.append(Target.of("forgetting_ratio_to_lora_libero", ratio, 0.5))
    dimensions = {row["dimension"] for row in figures.get("plus", {}).get("rows", [])} - {"total"}
    aims.append(Target("pro_suites", len(figures.get("pro", {}).get("suites", [])), len(PRO_SUITES), True))
    aims.append(Target("plus_dimensions", len(dimensions), 5, True))
    beside = read_record("lerobot") or {"targets": ()}  # benchmarks.lerobot
    speedups = [one["value"] for one in beside["targets"] if one["name"] == "speedup_over_lerobot"]
    aims.append(Target("speedup_over_lerobot", speedups[0] if speedups else None, 3.0, True))
    return aims


def main(study: LiberoStudy) -> None:
    """Runs what is missing of the parts, prints, and on a full run records."""
    console = Console()
    with placed(study, study.quick) as here, connect(here):
        measure_parts("libero", here, Parts(here, console).measure, targets, console, here.training_seeds)


if __name__ == "__main__":
    run(LiberoStudy, main, __doc__)
