"""Writes the tables of README.md and docs/*.md from `benchmarks/results/*.json`.

    python -m benchmarks.tables

A table stands between `<!-- NAME KIND -->` and `<!-- /NAME KIND -->`, as in `<!-- quickstart success -->`; what is
between the marks is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data_tables import DATA
from benchmarks.expert import expert_table
from benchmarks.forgetting_tables import FORGETTING, choice_table
from benchmarks.gpu_tables import GPU
from benchmarks.markdown import head, line
from benchmarks.record import RESULTS, where
from benchmarks.rollout_tables import ROLLOUT
from benchmarks.service_tables import SERVICE

ROOT = Path(__file__).parents[1]
#: Every page that has a marked table.
PAGES = tuple(
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "<!-- /" in page.read_text()
)


def rendered(page: Path) -> str:
    """The page's text with every marked table made anew; one that has no results yet stays as it is."""
    return re.sub(r"<!-- (\w+) (\w+) -->\n.*?<!-- /\1 \2 -->", _marked, page.read_text(), flags=re.DOTALL)


def _marked(mark: re.Match[str]) -> str:
    name, kind = mark[1], mark[2]
    results = RESULTS / f"{name}.json"
    if not results.exists():
        return mark[0]
    record = json.loads(results.read_text())
    if kind in SERVICE and kind not in record["figures"]:  # a part that has not run
        return mark[0]
    return f"<!-- {name} {kind} -->\n{table(record, kind)}\n<!-- /{name} {kind} -->"


def table(record: Mapping[str, Any], kind: str) -> str:
    """One table of a record, in Markdown. KeyError for a kind that is unknown or has no figures."""
    if kind == "targets":
        return _targets(record)
    kinds = {
        "success": _success,
        "figures": _figures,
        **_MEMORY,
        **DATA,
        **FORGETTING,
        **GPU,
        **ROLLOUT,
        **SERVICE,
        "choice": choice_table,
        "expert": expert_table,
    }
    return kinds[kind](record["figures"])


def memory_tables(figures: Mapping[str, Any]) -> list[str]:
    """Those tables of `benchmarks.memory` that the figures are there for."""
    needs = {"families": "success", "delays": "delays", "plan": "plan", "costs": "costs"}
    return [_MEMORY[kind](figures) for kind, needed in needs.items() if needed in figures]


def target_rows(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of targets, as `benchmarks.record.Target.to_dict` gives them; notes below it."""
    notes = [f"`{t['name']}`: {t['note']}." for t in targets if t.get("note")]
    return [
        "| target | value | bound | met |",
        "|---|---|---|---|",
        *(
            line(t["name"], _value(t), f"{_side(t)} {t['bound']:.3f}", "yes" if t["met"] else "**no**")
            for t in targets
        ),
        *(["", " ".join(notes)] if notes else []),
    ]


def _value(target: Mapping[str, Any]) -> str:
    if target["value"] is None:
        return "none"
    interval = f" ({target['low']:.3f} to {target['high']:.3f})" if "low" in target else ""
    return f"{target['value']:.3f}{interval}"


def _side(target: Mapping[str, Any]) -> str:
    return (">" if target["at_least"] else "<") + ("" if target.get("beyond") else "=")


def _targets(record: Mapping[str, Any]) -> str:
    rows = target_rows(record["targets"])
    if any("run" in part for part in record["figures"].values() if isinstance(part, Mapping)):
        return "\n".join([*rows, "", "Commit and machine of each part stand below its table."])
    seeds = f", seeds {_seeds(record)}." if record["seeds"] else "."
    return "\n".join([*rows, "", where(record).removesuffix(".") + seeds + _earlier(record)])


def _earlier(record: Mapping[str, Any]) -> str:
    """A sentence on the runs before the last one that gave some of the figures."""
    commits = dict.fromkeys(run["commit"] for run in record.get("runs", []) if run["commit"] != record["commit"])
    return (
        f" Earlier runs, which count too, at {', '.join(f'`{one[:10]}`' for one in commits)}." if commits else ""
    )


def _seeds(record: Mapping[str, Any]) -> str:
    seeds = record["seeds"]
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} ({len(seeds)})"


def _success(figures: Mapping[str, Any]) -> str:
    policies = figures["success"]
    rows = [f"| family | {' | '.join(policies)} | chance |", "|---|" + "---|" * (len(policies) + 1)]
    for family, row in next(iter(policies.values())).items():
        cells = [_cell(table[family]) for table in policies.values()]
        rows.append(f"| {family} | {' | '.join(cells)} | {row['chance']:.2f} |")
    return "\n".join(rows)


def _cell(row: Mapping[str, Any]) -> str:
    low, high = row["wilson95"]
    return f"{row['k']}/{row['n']} = {row['rate']:.2f} ({low:.2f}-{high:.2f})"


def _figures(figures: Mapping[str, Any]) -> str:
    rows = ["| figure | mean | least | largest |", "|---|---|---|---|"]
    rows += [f"| {name} | {f['mean']} | {f['min']} | {f['max']} |" for name, f in figures.items()]
    return "\n".join(rows)


def _families(figures: Mapping[str, Any]) -> str:
    return _rates(figures["success"], "{}")


def _delays(figures: Mapping[str, Any]) -> str:
    return _rates(figures["delays"], "delay {}")


def _rates(rates: Mapping[str, Mapping[str, Any]], heading: str) -> str:
    """Mechanisms as rows, with chance in the last; n below."""
    first = next(iter(rates.values()))
    rows = [line("mechanism", *(heading.format(name) for name in first)), "|---" * (len(first) + 1) + "|"]
    rows += [line(name, *map(_short_cell, row.values())) for name, row in rates.items()]
    rows.append(line("chance", *(f"{cell['chance']:.2f}" for cell in first.values())))
    sizes = [cell["n"] for row in rates.values() for cell in row.values()]
    n = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    seeds = len(next(iter(first.values()))["seeds"])
    over = f"{seeds} training seeds" if seeds > 1 else "one training seed"
    return "\n".join([*rows, "", f"Wilson 95 % intervals; n = {n} episodes per cell, over {over}."])


def _short_cell(row: Mapping[str, Any]) -> str:
    low, high = row["wilson95"]
    return f"{row['rate']:.2f} ({low:.2f}-{high:.2f})"


def _costs(figures: Mapping[str, Any]) -> str:
    headings = (
        "mechanism",
        "parameters",
        "of them memory",
        "state, bytes per episode",
        "act, batch 1, ms",
        "act, batch 8, ms",
        "batch 8 against 8 acts",
        "step 1000 / step 10",
        "training frames/s",
    )
    rows = [line(*headings), "|---" + "|--:" * (len(headings) - 1) + "|"]
    rows += [
        line(
            name,
            f"{c['parameters']:,}",
            f"{c['memory_parameters']:,}",
            f"{c['state_bytes']:,}",
            f"{c['act_ms_batch1']:.1f}",
            f"{c['act_ms_batch8']:.1f}",
            f"{c['batch8_speedup']:.1f} x",
            f"{c['growth']:.2f}",
            f"{c['frames_per_s']:.0f}",
        )
        for name, c in figures["costs"].items()
    ]
    return "\n".join(rows)


def _plan(figures: Mapping[str, Any]) -> str:
    plan = figures["plan"]
    families = list(next(iter(plan["ways"].values()))["success"])
    headings = ("reasoning", "tokens per control step", "wall ms per control step", "CPU ms per control step")
    rows = [line(*headings, *families), "|---" * (len(headings) + len(families)) + "|"]
    rows += [
        line(
            name,
            f"{way['tokens_per_step']:.2f}",
            f"{way['wall_ms_per_step']:.2f}",
            f"{way['cpu_ms_per_step']:.2f}",
            *(_cell(way["success"][family]) for family in families),
        )
        for name, way in plan["ways"].items()
    ]
    paired = plan["paired"]
    verdict = "a significant loss" if plan["once_loses_significantly"] else "no significant loss"
    tested = (
        f"Once takes {plan['wall_speedup']:.1f} times less wall time and {plan['cpu_speedup']:.1f} times less CPU "
        f"time. Of {paired['pairs']} layouts, {paired['only_once']} succeeded only with reasoning once and "
        f"{paired['only_every_step']} only with reasoning at every step: {verdict} (exact McNemar, "
        f"p = {paired['p_value']:.2g})."
    )
    return "\n".join([*rows, "", tested])


def _use(figures: Mapping[str, Any]) -> str:
    """Of `ray_jobs.memory_use`: by probe, what is left of the undisturbed successes at each t."""
    rows: dict[str, dict[int, str]] = {}
    for row in figures["tasks"]:
        low, high = row["lost95"]
        lost = f"lost {row['lost']:.2f} ({low:.2f} to {high:.2f})"
        rows.setdefault(row["probe"], {})[row["t"]] = f"{row['undisturbed']} -> {row['k']} of {row['n']}, {lost}"
    times = list(next(iter(rows.values())))
    headings = head("memory", *(f"from step {t}" for t in times))
    return "\n".join([*headings, *(line(name, *(cells[t] for t in times)) for name, cells in rows.items())])


_MEMORY: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "families": _families,
    "delays": _delays,
    "plan": _plan,
    "costs": _costs,
    "use": _use,
}


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path))
