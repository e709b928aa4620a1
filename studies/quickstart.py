"""Does memory matter where it should? The quickstart's own results against what was promised.

    python -m studies.quickstart [--quick] [--storage_root DIR]

Runs `ray_jobs.quickstart` as it is, with a second training seed, and in bfloat16 (or takes the results of those
that are complete under that storage root), and checks the worst of the three. A full run writes
`benchmarks/results/quickstart.json`; `--quick` runs the smoke tier once and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from ray_jobs.command_line.cli import run
from ray_jobs.quickstart import QuickstartConfig
from ray_jobs.quickstart import main as quickstart
from studies.engine import entries
from studies.record import Target, conclude, read_record

#: A run's `summary.json`.
Summary = dict[str, Any]


@dataclass(frozen=True)
class QuickstartStudy:
    """What is run.

    Attributes:
        quick: the smoke tier; writes nothing.
        storage_root: where it runs; a temporary place by default.
        seeds: of the trainings; `make quickstart` runs the first.
        bf16: the first seed once more, in bfloat16.
    """

    quick: bool = False
    storage_root: Path | None = None
    seeds: tuple[int, ...] = (0, 1)
    bf16: bool = True

    @property
    def repeats(self) -> list[tuple[int, str | None]]:
        """Seed and number format of every run, None for the preset's."""
        runs: list[tuple[int, str | None]] = [(seed, None) for seed in self.seeds]
        return runs[:1] if self.quick else [*runs, *([(self.seeds[0], "bf16")] if self.bf16 else [])]


def targets(summaries: Sequence[Summary]) -> list[Target]:
    """What issue and README promise, from the repeats: the worst of them counts, the minutes are the first's."""

    def rates(memory: str, family: str) -> list[float]:
        return [one["success"][memory][family]["rate"] for one in summaries]

    def gap(success: Summary) -> float:
        low, high = success["gru"]["count"]["wilson95"][0], success["none"]["count"]["wilson95"][1]
        return float(low - high)

    first, recalled = summaries[0], [one["success"]["none"]["recall"] for one in summaries]
    values = {
        "recall_gru": min(rates("gru", "recall")),
        "recall_none_interval_low": max(table["wilson95"][0] for table in recalled),
        "ground_gru": min(rates("gru", "ground")),
        "ground_none": min(rates("none", "ground")),
        "count_gru": min(rates("gru", "count")),
        "count_gap_of_intervals": min(gap(one["success"]) for one in summaries),
        "place_gru": min(rates("gru", "place")),
        "place_none": min(rates("none", "place")),
        "wall_minutes": first["wall_s"] / 60,
        "simulator_cpu_ms_per_step": first["collect"]["cpu_ms_per_step"],
    }
    least, most = (entries("quickstart")[side] for side in ("at_least", "at_most"))
    bounds = {**least, **most, "recall_none_interval_low": recalled[0]["chance"]}
    return [Target(name, value, bounds[name], name in least) for name, value in values.items()]


def figures(configs: Sequence[QuickstartConfig], summaries: Sequence[Summary]) -> Summary:
    """The first run's figures as they are; of every repeat minutes of training, and success."""
    first, repeats = summaries[0], []
    for config, summary in zip(configs, summaries, strict=True):
        settings = {"seed": config.seed, "precision": config.training("gru").training.precision}
        repeats.append({**settings, "train": summary["train"], "success": summary["success"]})
    return {name: first[name] for name in ("wall_s", "collect", "train", "success", "paired")} | {
        "repeats": repeats
    }


def main(study: QuickstartStudy) -> None:
    """Runs, prints the targets, and on a full run records them."""
    console = Console()
    with TemporaryDirectory() as scratch:
        root, tier = study.storage_root or Path(scratch), "smoke" if study.quick else "full"
        configs = [
            QuickstartConfig(storage_root=root, tier=tier, seed=seed, precision=precision)
            for seed, precision in study.repeats
        ]
        known = (configs[0].runs / configs[0].study / "summary.json").exists()
        for config in configs:
            quickstart(config)
        summaries = [json.loads((one.runs / one.study / "summary.json").read_text()) for one in configs]
    seeds, record = sorted({config.seed for config in configs}), read_record("quickstart")
    earlier = record["runs"] if record and known else []
    met, told = targets(summaries), figures(configs, summaries)
    conclude("quickstart", seeds, told, met, console, quick=study.quick, earlier=earlier)


if __name__ == "__main__":
    run(QuickstartStudy, main, __doc__)
