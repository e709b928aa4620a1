"""The memory benchmark's figures, targets and plot, from the tables that its evaluations gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.record import Target
from evaluators.success_table import SuccessRow, SuccessTable, tabulate
from ipvla.sim.recall.tasks import RecallTask
from ipvla.sim.simulator import Task

#: Family of the tasks that only the delay curve is about.
_DELAY = "delay"
#: Of these the better one must remember over a long delay.
_LONG_LIVED = ("latent", "bank")


def success_figures(
    tasks: Sequence[Task], played: Mapping[str, Mapping[int, SuccessTable]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Mechanism -> family -> the row pooled over seeds, with every seed's counts under `seeds`.

    Args:
        played: mechanism -> training seed -> what it came to, on layouts of the seed's own.
    """
    return {
        mechanism: {
            row.name: _row(row, {seed: table.families for seed, table in tables.items()})
            for row in _pooled(mechanism, tasks, tables).families
            if row.name != _DELAY
        }
        for mechanism, tables in played.items()
    }


def delay_figures(
    tasks: Sequence[Task], played: Mapping[str, Mapping[int, SuccessTable]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Mechanism -> delay in control steps, ascending -> its row, as in `success_figures`."""
    delays = {
        task.name: task.delay_steps
        for task in tasks
        if isinstance(task, RecallTask) and task.family in ("recall", _DELAY)
    }
    curves = {}
    for mechanism, tables in played.items():
        rows = [row for row in _pooled(mechanism, tasks, tables).tasks if row.name in delays]
        rows.sort(key=lambda row: delays[row.name])
        seeds = {seed: table.tasks for seed, table in tables.items()}
        curves[mechanism] = {str(delays[row.name]): _row(row, seeds) for row in rows}
    return curves


def joined(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of two runs of one recipe: success over the seeds of both, costs and the rest of the later run.

    A seed that both have counts once, as the later run has it. Reasoning once against every step is of the run
    that played more layouts.
    """
    figures = {**later, **{kind: _join_rows(earlier[kind], later[kind]) for kind in ("success", "delays")}}
    figures["plan"] = max(later["plan"], earlier["plan"], key=lambda plan: plan["paired"]["pairs"])
    return figures


def _join_rows(
    earlier: Mapping[str, Mapping[str, Any]], later: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    def join(name: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
        seeds = dict(sorted((one["seeds"] | two["seeds"]).items(), key=lambda item: int(item[0])))
        k, n = (sum(counts[of] for counts in seeds.values()) for of in "kn")
        return {**SuccessRow(name, k, n, two["chance"]).to_dict(), "seeds": seeds}

    return {
        mechanism: {name: join(name, earlier[mechanism][name], row) for name, row in rows.items()}
        for mechanism, rows in later.items()
    }


def _pooled(mechanism: str, tasks: Sequence[Task], tables: Mapping[int, SuccessTable]) -> SuccessTable:
    return tabulate(mechanism, tasks, [result for table in tables.values() for result in table.results], {})


def _row(row: SuccessRow, seeds: Mapping[int, Sequence[SuccessRow]]) -> dict[str, Any]:
    counts = {str(seed): {"k": r.k, "n": r.n} for seed, rows in seeds.items() for r in rows if r.name == row.name}
    return {**row.to_dict(), "seeds": counts}


def third_best(success: Mapping[str, Mapping[str, Mapping[str, Any]]], family: str) -> float:
    """The success rate that three mechanisms reach at least. ValueError if fewer than three were evaluated."""
    rates = sorted((rows[family]["rate"] for rows in success.values()), reverse=True)
    if len(rates) < 3:
        raise ValueError(f"only {len(rates)} mechanisms were evaluated on {family}; compare at least 3")
    return float(rates[2])


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, from the figures of a run that compared `none`, `latent` or `bank`, and `prompt`."""
    success, delays, costs, plan = (figures[name] for name in ("success", "delays", "costs", "plan"))
    blind = success["none"]["recall"]
    long_lived = [delays[name]["100"]["rate"] for name in _LONG_LIVED if name in delays]
    return [
        Target("recall_third_best", third_best(success, "recall"), 0.9, at_least=True),
        Target("count_third_best", third_best(success, "count"), 0.85, at_least=True),
        Target("recall_none", blind["wilson95"][0], blind["chance"], at_least=False),
        Target("delay100_best", max(long_lived), 0.8, at_least=True),
        Target("plan_once_speedup", min(plan["wall_speedup"], plan["cpu_speedup"]), 5.0, at_least=True),
        Target("act_cost_growth", max(cost["growth"] for cost in costs.values()), 1.1, at_least=False),
        Target("batch8_speedup", min(cost["batch8_speedup"] for cost in costs.values()), 2.0, at_least=True),
    ]


def plot_delays(delays: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Success against delay, a line with Wilson intervals per mechanism, and chance; PNG."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    panel = figure.subplots()
    markers = "osD^v<>Xph"
    for place, (mechanism, rows) in enumerate(delays.items()):
        aside = 1.02 ** (place - len(delays) / 2)  # or intervals would hide one another
        x = [int(delay) * aside for delay in rows]
        y = [row["rate"] for row in rows.values()]
        below, above = ([abs(row["wilson95"][i] - row["rate"]) for row in rows.values()] for i in (0, 1))
        marker = markers[place % len(markers)]
        panel.errorbar(x, y, (below, above), label=mechanism, marker=marker, markersize=4, elinewidth=0.7)
    rows = next(iter(delays.values()))
    panel.axhline(next(iter(rows.values()))["chance"], color="gray", linestyle=":", linewidth=1, label="chance")
    panel.set_xscale("log")
    panel.set_xticks([int(delay) for delay in rows], labels=list(rows))
    panel.minorticks_off()
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("delay between cue and go (control steps of 1/20 s)")
    panel.set_ylabel("success on held-out layouts")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
