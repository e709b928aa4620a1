"""How often policies succeed, and when their episodes end, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from evaluators.success_table import SuccessTable

_COLOURS = {"success": "#2a9d55", "failure": "#d1495b", "timeout": "#e0a030"}


def success_bars(tables: Sequence[SuccessTable]) -> bytes | None:
    """Per task a bar for each policy, with Wilson's 95 % interval; None if nothing was played."""
    tasks = list(dict.fromkeys(row.name for table in tables for row in table.tasks))
    if not tasks:
        return None
    figure = Figure(figsize=(10, 1 + 0.28 * len(tasks) * max(len(tables), 2)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(tables)
    for i, table in enumerate(tables):
        rows = {row.name: row for row in table.tasks}
        at = [tasks.index(name) + (i - (len(tables) - 1) / 2) * height for name in rows]
        rates = np.array([row.rate for row in rows.values()])
        low, high = np.array([row.wilson95 for row in rows.values()]).T
        whiskers = np.clip([rates - low, high - rates], 0, None)
        axes.barh(at, rates, 0.9 * height, xerr=whiskers, label=table.policy, error_kw={"elinewidth": 1})
    axes.set(yticks=range(len(tasks)), xlim=(0, 1), xlabel="success")
    axes.set_yticklabels([_short(task) for task in tasks], fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return _png(figure)


def failure_timeline(tables: Sequence[SuccessTable]) -> bytes | None:
    """Per policy and task a line of control steps, marked where episodes ended; None if nothing was played.

    Episodes that ran again, because a process died under them, have a ring.
    """
    lines = [(table.policy, row.name) for table in tables for row in table.tasks]
    if not lines:
        return None
    figure = Figure(figsize=(10, 1 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    ended = [
        (result, lines.index((table.policy, result.spec.task))) for table in tables for result in table.results
    ]
    for outcome, colour in _COLOURS.items():
        if at := [(result.steps, line) for result, line in ended if result.outcome == outcome]:
            steps, rows = zip(*at, strict=True)
            axes.scatter(steps, rows, marker="|", s=90, color=colour, label=outcome)
    if at := [(result.steps, line) for result, line in ended if result.spec.attempt]:
        steps, rows = zip(*at, strict=True)
        axes.scatter(steps, rows, s=70, facecolors="none", edgecolors="black", label="ran again")
    axes.set(yticks=range(len(lines)), xlim=(0, None), xlabel="control steps until the episode ended")
    axes.set_yticklabels([f"{policy}: {_short(task)}" for policy, task in lines], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def _short(task: str) -> str:
    return task if len(task) <= 60 else f"{task[:57]}..."


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
