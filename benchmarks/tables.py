"""Writes the tables of README.md and docs/benchmarks.md from `benchmarks/results/*.json`.

    python -m benchmarks.tables

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is between the marks is replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


def rendered(page: Path) -> str:
    """The page's text with every marked table made anew."""
    return re.sub(
        r"<!-- (\w+) (\w+) -->\n.*?<!-- /\1 \2 -->",
        lambda mark: f"<!-- {mark[1]} {mark[2]} -->\n{_table(mark[1], mark[2])}\n<!-- /{mark[1]} {mark[2]} -->",
        page.read_text(),
        flags=re.DOTALL,
    )


def _table(name: str, kind: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return {"targets": _targets, "success": _success, "figures": _figures}[kind](record)


def _targets(record: dict[str, Any]) -> str:
    rows = ["| target | value | bound | met |", "|---|---|---|---|"]
    rows += [
        f"| {t['name']} | {t['value']:.3f} | {'>=' if t['at_least'] else '<='} {t['bound']:.3f} "
        f"| {'yes' if t['met'] else '**no**'} |"
        for t in record["targets"]
    ]
    machine = record["machine"]
    return "\n".join(
        [
            *rows,
            "",
            f"Commit `{record['commit'][:10]}`, {machine['cpu']}, {machine['os']}, seeds {_seeds(record)}.",
        ]
    )


def _seeds(record: dict[str, Any]) -> str:
    seeds = record["seeds"]
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} ({len(seeds)})"


def _success(record: dict[str, Any]) -> str:
    policies = record["figures"]["success"]
    rows = [f"| family | {' | '.join(policies)} | chance |", "|---|" + "---|" * (len(policies) + 1)]
    for family, row in next(iter(policies.values())).items():
        cells = [_cell(table[family]) for table in policies.values()]
        rows.append(f"| {family} | {' | '.join(cells)} | {row['chance']:.2f} |")
    return "\n".join(rows)


def _cell(row: dict[str, Any]) -> str:
    low, high = row["wilson95"]
    return f"{row['k']}/{row['n']} = {row['rate']:.2f} ({low:.2f}-{high:.2f})"


def _figures(record: dict[str, Any]) -> str:
    rows = ["| figure | mean | least | largest |", "|---|---|---|---|"]
    rows += [f"| {name} | {f['mean']} | {f['min']} | {f['max']} |" for name, f in record["figures"].items()]
    return "\n".join(rows)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path))
