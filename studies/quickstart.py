"""Does memory matter where it should? The quickstart's own results against what was promised.

    python -m benchmarks.quickstart [--quick] [--storage_root DIR]

Runs `ray_jobs.quickstart` (or takes its results, if it is complete under that storage root) and checks them. A
full run writes `benchmarks/results/quickstart.json`; `--quick` runs the smoke tier and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import Target, write_record
from ray_jobs.quickstart import QuickstartConfig
from ray_jobs.quickstart import main as quickstart


def targets(summary: dict[str, Any]) -> list[Target]:
    """What issue and README promise, from a `summary.json`."""
    gru, none = summary["success"]["gru"], summary["success"]["none"]
    blind = none["recall"]
    return [
        Target("recall_gru", gru["recall"]["rate"], 0.85, at_least=True),
        Target("recall_none_interval_low", blind["wilson95"][0], blind["chance"], at_least=False),
        Target("ground_gru", gru["ground"]["rate"], 0.9, at_least=True),
        Target("ground_none", none["ground"]["rate"], 0.9, at_least=True),
        Target("count_gru", gru["count"]["rate"], 0.85, at_least=True),
        Target(
            "count_gap_of_intervals",
            gru["count"]["wilson95"][0] - none["count"]["wilson95"][1],
            0.0,
            at_least=True,
        ),
        Target("place_gru", gru["place"]["rate"], 0.8, at_least=True),
        Target("place_none", none["place"]["rate"], 0.8, at_least=True),
        Target("wall_minutes", summary["wall_s"] / 60, 20.0, at_least=False),
        Target("simulator_cpu_ms_per_step", summary["collect"]["cpu_ms_per_step"], 8.0, at_least=False),
    ]


def main() -> None:
    """Runs, prints the targets, and on a full run records them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smoke tier; writes nothing")
    parser.add_argument("--storage_root", type=Path, help="where it runs; a temporary place by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tier = "smoke" if arguments.quick else "full"
        config = QuickstartConfig(storage_root=arguments.storage_root or Path(scratch), tier=tier)
        quickstart(config)
        summary = json.loads((config.runs / config.study / "summary.json").read_text())
    table = Table(title=f"quickstart, {tier} tier")
    for heading in ("target", "value", "bound", "met"):
        table.add_column(heading)
    for target in targets(summary):
        sign = ">=" if target.at_least else "<="
        table.add_row(
            target.name, f"{target.value:.3f}", f"{sign} {target.bound:.3f}", "yes" if target.met else "no"
        )
    console = Console()
    console.print(table)
    if not arguments.quick:
        figures = {name: summary[name] for name in ("wall_s", "collect", "train", "success", "paired")}
        console.print(write_record("quickstart", [config.training("gru").seed], figures, targets(summary)))


if __name__ == "__main__":
    main()
