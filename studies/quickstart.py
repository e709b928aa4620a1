"""Does memory matter where it should? The quickstart's own results against what was promised.

    python -m studies.quickstart [--quick] [--storage_root DIR]

Runs `ray_jobs.quickstart` (or takes its results, if it is complete under that storage root) and checks them. A
full run writes `benchmarks/results/quickstart.json`; `--quick` runs the smoke tier and writes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from ray_jobs.command_line.cli import run
from ray_jobs.quickstart import QuickstartConfig
from ray_jobs.quickstart import main as quickstart
from studies.engine import entries
from studies.record import Target, write_record
from studies.tables import target_table


@dataclass(frozen=True)
class QuickstartStudy:
    """What is run.

    Attributes:
        quick: the smoke tier; writes nothing.
        storage_root: where it runs; a temporary place by default.
    """

    quick: bool = False
    storage_root: Path | None = None


def targets(summary: dict[str, Any]) -> list[Target]:
    """What issue and README promise, from a `summary.json`."""
    gru, none = summary["success"]["gru"], summary["success"]["none"]
    values = {
        "recall_gru": gru["recall"]["rate"],
        "recall_none_interval_low": none["recall"]["wilson95"][0],
        "ground_gru": gru["ground"]["rate"],
        "ground_none": none["ground"]["rate"],
        "count_gru": gru["count"]["rate"],
        "count_gap_of_intervals": gru["count"]["wilson95"][0] - none["count"]["wilson95"][1],
        "place_gru": gru["place"]["rate"],
        "place_none": none["place"]["rate"],
        "wall_minutes": summary["wall_s"] / 60,
        "simulator_cpu_ms_per_step": summary["collect"]["cpu_ms_per_step"],
    }
    least, most = (entries("quickstart")[side] for side in ("at_least", "at_most"))
    bounds = {**least, **most, "recall_none_interval_low": none["recall"]["chance"]}
    return [Target(name, value, bounds[name], name in least) for name, value in values.items()]


def main(study: QuickstartStudy) -> None:
    """Runs, prints the targets, and on a full run records them."""
    console = Console()
    with TemporaryDirectory() as scratch:
        root, tier = study.storage_root or Path(scratch), "smoke" if study.quick else "full"
        config = QuickstartConfig(storage_root=root, tier=tier)
        quickstart(config)
        summary = json.loads((config.runs / config.study / "summary.json").read_text())
    met = targets(summary)
    console.print(Markdown(target_table([target.to_dict() for target in met])))
    if not study.quick:
        figures = {name: summary[name] for name in ("wall_s", "collect", "train", "success", "paired")}
        console.print(f"written to {write_record('quickstart', [config.training('gru').seed], figures, met)}")


if __name__ == "__main__":
    run(QuickstartStudy, main, __doc__)
