"""Published checkpoints: what is exact, which memories work on which family, what is learned, what it costs.

    python -m studies.checkpoints [--parts "[learning]"] [--seeds "[0]"] [--quick]

- formats: the tests that compare each format with what its public code computed (`studies/checkpoints.yaml`).
- families: memories x backbones whose tests pass.
- learning: random models in OpenVLA-OFT's and pi0's layout: import, LoRA and a memory on Recall, evaluation.
- overheads: our training and acting beside a bare loop on the same weights (`studies.bare_loop`).
- import: the largest memory of `ipvla import`, in weights.

A full run writes every part to `benchmarks/results/checkpoints.json` beside what is there of the others; one that
was interrupted goes on where it was, if it gets the same storage root. `--quick` results mean nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from rich.console import Console

from evaluators.intervals import wilson_interval
from evaluators.success import SuccessConfig
from ipvla.data.normalisation import FeatureStatistics
from ipvla.data.statistics import Statistics
from ipvla.storage import SOURCE_TREE
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import arguments, parse
from ray_jobs.import_policy import ImportConfig
from ray_jobs.import_policy import main as import_policy
from ray_jobs.running.cluster import connect
from studies.bare_loop import measure as measure_overheads
from studies.engine import Runner, entries, placed
from studies.random_checkpoints import PI_TOKENIZER, Sizes, write_openvla_oft, write_pi0
from studies.record import Figures, PartStudy, Target, measure_parts

MEMORIES: Final = ("gru", "none")
_PRESETS: Final = SOURCE_TREE / "ray_jobs" / "experiments" / "checkpoints"
_KEY: Final = "recall"
#: Nobody has looked at these to choose the recipe.
_FIRST_LAYOUT: Final = 7000
#: Of this project's own demonstrations.
_TERMS: Final = {
    "gripper": "environment",
    "pictures": {"orientation": "upright"},
    "state": "hand_padded",
    "action": "hand",
    "control_hz": 20,
}
_IMPORT: Final = """
import resource, sys
from ray_jobs.command_line.settings import parse
from ray_jobs.import_policy import ImportConfig, main
main(parse(ImportConfig, sys.argv[1:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@dataclass(frozen=True)
class CheckpointStudy(PartStudy):
    """What is measured.

    Attributes:
        seeds: of the random weights and their training.
        episodes: held-out layouts of each of Recall's two families.
        rounds: of the race against the bare loop.
    """

    all_parts: ClassVar[tuple[str, ...]] = ("formats", "families", "learning", "overheads", "import")
    seeds: tuple[int, ...] = (0,)
    episodes: int = 80
    rounds: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "episodes", "rounds")
        if not self.seeds:
            raise ValueError("seeds is []; give at least one")

    @property
    def study(self) -> str:
        return "checkpoints-quick" if self.quick else "checkpoints"

    @property
    def directory(self) -> Path:
        return self.runs / self.study


class Parts:
    """Measures them."""

    def __init__(self, study: CheckpointStudy, console: Console) -> None:
        self._study, self._console = study, console
        self._layouts: Mapping[str, Mapping[str, Any]] = entries("checkpoints")["layouts"]

    def measure(self, part: str) -> Figures:
        """The figures of one part."""
        return {
            "formats": self._formats,
            "families": self._families,
            "learning": self._learning,
            "overheads": self._overheads,
            "import": self._import,
        }[part]()

    def _formats(self) -> Figures:
        known = entries("checkpoints")["formats"]
        chosen = list(known)[: 1 if self._study.quick else None]
        return {name: all_pass(known[name]["tests"], known[name].get("select", "")) for name in chosen}

    def _families(self) -> Figures:
        outcomes = _outcomes([entries("checkpoints")["families"]], "smolvlm-gru" if self._study.quick else "")
        cells: dict[str, dict[str, bool]] = {}
        for test, passed in outcomes.items():
            family, memory = test.partition("[")[2].removesuffix("]").split("-")
            cells.setdefault(family, {})[memory] = passed
        return cells

    def _learning(self) -> Figures:
        study = self._study
        with connect(study):
            runner = Runner(study.directory, self._console)
            statistics = self._demonstrations(runner)
            runs, policies = dict[str, list[str]](), dict[str, Path]()
            for seed in study.seeds:
                for layout in self._layouts:
                    source = self._source(layout, seed, statistics)
                    for memory in MEMORIES:
                        name = f"{layout}-{memory}-seed{seed}"
                        runs[name] = self._training(
                            name, layout, self._imported(name, layout, source, memory), seed
                        )
                        policies[name] = study.directory / name / "policy"
            trained = runner.train("adapters, memory and head", runs)
            tables = runner.play("held-out layouts", policies, self._success(), study.cache, "recall")
        return {
            "success": {name: {row.name: row.to_dict() for row in one.families} for name, one in tables.items()},
            "train": {name: {"wall_s": one.wall_s, "loss": one.final_loss} for name, one in trained.items()},
        }

    def _demonstrations(self, runner: Runner) -> Statistics:
        """Collects them if they are missing; their statistics."""
        preset = ["--config_path", str(_PRESETS / "collect.yaml"), *arguments(self._study.directories)]
        config = parse(CollectConfig, preset)
        if self._study.quick:
            config = replace(config, demonstrations=dict.fromkeys(config.demonstrations, 3))
        runner.collect([config])
        return Statistics.load(config.directory / "dataset_statistics.json")

    def _success(self) -> SuccessConfig:
        """The same held-out layouts for all."""
        n = 2 if self._study.quick else self._study.episodes
        given = arguments({"suite": "recall", "camera_size": 64, "first_layout": _FIRST_LAYOUT})
        config = parse(SuccessConfig, given)
        return replace(config, episodes={"ground_red": n // 2, "ground_blue": n - n // 2, "recall": n})

    def _source(self, layout: str, seed: int, statistics: Statistics) -> Path:
        """The random checkpoint's directory."""
        into, sizes = self._study.directory / f"{layout}-seed{seed}", Sizes(**self._layouts[layout]["sizes"])
        if not into.exists():
            if layout == "pi0":
                write_pi0(into, sizes, statistics, seed)
            else:
                write_openvla_oft(into, sizes, statistics, _KEY, seed)
        return into

    def _imported(self, name: str, layout: str, source: Path, memory: str) -> Path:
        """The settings of training that `ipvla import` writes beside the policy that it makes."""
        policy = self._study.directory / f"{name}-imported" / "policy"
        given = {"source": source, "policy": policy, "terms": _TERMS, "cameras": ["agentview"]}
        own = {"pi.tokenizer": PI_TOKENIZER} if layout == "pi0" else {}
        values = {**given, **own, "model.memory.type": memory, **self._layouts[layout]["import"]}
        if not policy.exists():
            import_policy(parse(ImportConfig, arguments(values)))
        return policy.with_name("policy.train.yaml")

    def _training(self, name: str, layout: str, settings: Path, seed: int) -> list[str]:
        """The arguments of `ray_jobs.train`."""
        values = {
            "study": self._study.study, "name": name, "seed": seed, "lanes.seed": seed,
            **entries("checkpoints")["training"], **self._layouts[layout]["train"],
        }  # fmt: skip
        if self._study.quick:
            values["training.steps"] = 20
        return ["--config_path", str(settings), *arguments(self._study.directories), *arguments(values)]

    def _overheads(self) -> Figures:
        with connect(self._study):
            statistics = self._demonstrations(Runner(self._study.directory, self._console))
        sizes = Sizes(**entries("checkpoints")["overheads"])
        with tempfile.TemporaryDirectory() as scratch:
            study = replace(self._study, run_root_dir=Path(scratch))
            source, part = Path(scratch) / "model", Parts(study, self._console)
            write_openvla_oft(source, sizes, statistics, _KEY, 0)
            given = part._training("bare", "openvla_oft", part._imported("bare", "openvla_oft", source, "none"), 0)
            return asdict(measure_overheads(given, 3 if study.quick else study.rounds))

    def _import(self) -> Figures:
        """Beyond that of a small model, so that the program itself does not count."""
        values = np.zeros((1, 7), np.float32)
        one = FeatureStatistics.compute(values, np.ones(7, np.bool_))
        small, large = (Sizes(**entries("checkpoints")[name]) for name in ("overheads", "import"))
        with tempfile.TemporaryDirectory() as scratch:
            peaks, weights = [], []
            for name, sizes in (("small", small), ("large", large)):
                source = Path(scratch) / name
                write_openvla_oft(source, sizes, Statistics(one, one, 1, 1), _KEY, 0)
                given = {"source": source, "policy": Path(scratch) / f"{name}-policy", "chunk": sizes.chunk}
                command = [sys.executable, "-c", _IMPORT, *arguments(given)]
                lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
                peaks.append(int(lines[-1]))
                weights.append(sum(path.stat().st_size for path in source.glob("*.safetensors")))
        more = weights[1] - weights[0]
        return {"weights_mib": weights[1] / 2**20, "peak_ratio": (peaks[1] - peaks[0]) / more}


def _outcomes(tests: Sequence[str], select: str) -> dict[str, bool]:
    """Test -> whether it passed, by pytest's names; those that were skipped are left out."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        command += ["-k", select] if select else []
        subprocess.run(command, cwd=SOURCE_TREE, capture_output=True, check=False)
        if not report.exists():
            return {}
        cases = list(ET.parse(report).iter("testcase"))
    return {
        f"{case.get('classname')}::{case.get('name')}": not any(
            case.find(t) is not None for t in ("failure", "error")
        )
        for case in cases
        if case.find("skipped") is None
    }


def all_pass(tests: Sequence[str], select: str = "") -> bool:
    """Did every test that these name pass, and was there one of each?"""
    outcomes = [_outcomes([test], select) for test in tests]
    return all(found and all(found.values()) for found in outcomes)


def targets(figures: Figures) -> list[Target]:
    """What was promised."""
    formats, families = figures.get("formats"), figures.get("families")
    overheads, imports = figures.get("overheads", {}), figures.get("import", {})
    cells = [passed for name, row in (families or {}).items() if name != "run" for passed in row.values()]
    aims = [
        Target("formats_exact", None if formats is None else sum(v is True for v in formats.values()), 12, True),
        Target("memory_families", len(cells) and sum(cells) / len(cells), 1.0, True, note=f"of {len(cells)}"),
        Target("import_peak_rss_ratio", imports.get("peak_ratio"), 1.2, False),
        Target("train_overhead", overheads.get("train"), 1.05, False),
        Target("act_overhead", overheads.get("act"), 1.05, False),
        Target("memory_overhead", overheads.get("memory"), 1.1, False),
    ]
    success = figures.get("learning", {}).get("success", {})
    for layout in entries("checkpoints")["layouts"]:
        for family, bound in entries("checkpoints")["aims"].items():
            rows = [rows[family] for name, rows in success.items() if name.startswith(f"{layout}-gru")]
            k, n = sum(row["k"] for row in rows), sum(row["n"] for row in rows)
            interval = wilson_interval(k, n) if n else None
            aims.append(Target(f"{layout}_{family}_gru", k / n if n else None, bound, True, interval=interval))
    return aims


def main(study: CheckpointStudy) -> None:
    """Runs what is missing of the parts, prints, and on a full run records."""
    console = Console()
    with placed(study, study.quick) as here:
        measure_parts("checkpoints", here, Parts(here, console).measure, targets, console, here.seeds)


if __name__ == "__main__":
    run(CheckpointStudy, main, __doc__)
