"""Plots: success and ends of episodes, learning curves, tracked runs against each other, use of a memory."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from evaluators.run_table import number, short_names
from evaluators.success_table import SuccessTable
from evaluators.tracked_runs import TrackedRun, labels
from ipvla.tracking import read_jsonl

if TYPE_CHECKING:
    from evaluators.memory_use import MemoryUse
    from evaluators.open_loop import EpisodeTrack

_COLOURS = {"success": "#2a9d55", "failure": "#d1495b", "timeout": "#e0a030"}
_CURVE_COLUMNS = 2
_NAMED_LINES = 12  # more lines have no legend: their colours repeat
_NAMED_POINTS = 12  # points that have room for their names
_DECADES = 1.0  # an axis of positive numbers that spans more is logarithmic
_WIDEST = 10  # characters of a value beside an axis
_USE_COLUMNS = 3
_DODGE = 0.012  # of the width: intervals at the same t stand side by side


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
        rates = [row.rate for row in rows.values()]
        error = whiskers(rates, [row.wilson95 for row in rows.values()])
        axes.barh(at, rates, 0.9 * height, xerr=error, label=table.policy, error_kw={"elinewidth": 1})
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


def learning_curves(runs: Mapping[str, Path], max_metrics: int = 8) -> bytes | None:
    """One panel per metric, one line per run; PNG. None if no run has two points of anything.

    Args:
        runs: name -> JSONL file as `ipvla.tracking.JsonlSink` writes it; a policy that was only copied has none.
    """
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run, path in runs.items():
        for line in read_jsonl(path) if path.exists() else ():
            for metric, value in line.items():
                if metric not in ("step", "time"):
                    curves.setdefault(metric, {}).setdefault(run, []).append((line["step"], value))
    return draw_curves(curves, max_metrics)


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], max_metrics: int = 8
) -> bytes | None:
    """PNG of metric -> run -> (step, value), in panels; None if no line has two points."""
    drawn = [metric for metric, lines in curves.items() if max(map(len, lines.values())) > 1][:max_metrics]
    if not drawn:
        return None
    rows = -(-len(drawn) // _CURVE_COLUMNS)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, _CURVE_COLUMNS, squeeze=False).flat
    for metric, panel in zip(drawn, panels, strict=False):
        for run, points in curves[metric].items():
            panel.plot(*zip(*points, strict=True), label=run, linewidth=1)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
        if len(curves[metric]) <= _NAMED_LINES:
            panel.legend(fontsize=8)
    for panel in panels:  # those left over
        panel.set_visible(False)
    return _png(figure)


def scatter(runs: Sequence[TrackedRun], x: str, y: str) -> Figure | None:
    """A point per run that has both metrics, with the intervals that were logged; None if there is none."""
    pairs = [(label, run) for label, run in zip(labels(runs), runs, strict=True) if {x, y} <= {*run.metrics}]
    if not pairs:
        return None
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.add_subplot()
    named: dict[tuple[float, float], list[str]] = {}  # several runs may lie on one point
    for place, (label, run) in enumerate(pairs):
        at = run.metrics[x], run.metrics[y]
        axes.errorbar(
            *at,
            xerr=_error(run, x),
            yerr=_error(run, y),
            fmt="o" if run.status == "finished" else "x",
            color=f"C{place % 10}" if len(pairs) <= _NAMED_POINTS else "C0",
            elinewidth=0.8,
            alpha=0.8,
        )
        named.setdefault(at, []).append(label)
    for at, names in named.items() if len(pairs) <= _NAMED_POINTS else ():
        axes.annotate("\n".join(names), at, (5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel=_with_ends(runs, x), ylabel=_with_ends(runs, y))
    axes.grid(alpha=0.3)
    return figure


def parallel_coordinates(
    runs: Sequence[TrackedRun], parameters: Sequence[str], metric: str, most: int = 10
) -> Figure | None:
    """A line per run through its parameters, coloured by the metric, which is the last axis.

    Runs without the metric, or without one of the parameters, have no line. None if there are fewer than two.

    Args:
        parameters: of which those are axes that have two values among these runs, the first `most`.
    """
    drawn = [run for run in runs if math.isfinite(run.metrics.get(metric, math.nan))]
    drawn = [run for run in drawn if all(name in run.params for name in parameters)]
    names = [name for name in parameters if len({run.params[name] for run in drawn}) > 1][:most]
    if len(drawn) < 2 or not names:
        return None
    figure = Figure(figsize=(2 + 1.4 * (len(names) + 1), 4.5), layout="constrained")
    axes = figure.add_subplot()
    values = [run.metrics[metric] for run in drawn]
    colours = ScalarMappable(Normalize(min(values), max(values)), colormaps["viridis"])
    columns = [_axis(axes, i, [run.params[name] for run in drawn]) for i, name in enumerate(names)]
    columns.append(_axis(axes, len(names), [repr(value) for value in values]))
    for i in np.argsort(values):  # the best on top
        axes.plot([column[i] for column in columns], color=colours.to_rgba(values[i]), alpha=0.8)
    axes.set_xticks(range(len(columns)), [*short_names(names), metric], rotation=20, ha="right", fontsize=8)
    axes.set(yticks=[], xlim=(-0.2, len(names) + 0.4), ylim=(-0.05, 1.05))
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(colours, ax=axes, label=metric)
    return figure


def plot_memory_use(use: MemoryUse, path: Path) -> list[Path]:
    """Writes one panel per family, one line with 95 % intervals per intervention, as `path`.png and `path`.svg."""
    families = list(dict.fromkeys(row.name for row in use.families))
    probes = list(dict.fromkeys(row.intervention for row in use.families))
    columns = min(_USE_COLUMNS, len(families))
    figure = Figure(figsize=(0.8 + 3.6 * columns, 3.2 * -(-len(families) // columns)), layout="constrained")
    panels = list(figure.subplots(-(-len(families) // columns), columns, squeeze=False, sharey=True).flat)
    success = {row.name: row for row in use.undisturbed.families}
    times = [row.t for row in use.families]
    width = max(times) - min(times) or 1
    for family, panel in zip(families, panels, strict=False):
        panel.axhline(0, color="0.6", linewidth=0.8)
        for i, probe in enumerate(probes):
            rows = [row for row in use.families if (row.name, row.intervention) == (family, probe)]
            shift = width * _DODGE * (i - (len(probes) - 1) / 2)
            panel.errorbar(
                [row.t + shift for row in rows],
                [row.lost for row in rows],
                yerr=whiskers([row.lost for row in rows], [row.lost95 for row in rows]),
                label=probe,
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
            )
        panel.set_title(f"{family} (undisturbed {success[family].k}/{success[family].n})", fontsize=9)
        panel.set_xlabel("memory changed at control step t", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in panels[::columns]:
        panel.set_ylabel("success lost", fontsize=8)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(probes), fontsize=8)
    for panel in panels[len(families) :]:
        panel.set_visible(False)
    figure.suptitle(f"Is the memory of {use.policy} used?", fontsize=10)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=130)
    return written


def whiskers(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
    """How far each interval reaches below and above its value, float64 [2, N]; a bootstrap's may just miss it."""
    low, high = np.array(intervals, np.float64).T
    error: npt.NDArray[np.float64] = np.clip([values - low, high - values], 0.0, None)
    return error


def _short(task: str) -> str:
    return task if len(task) <= 60 else f"{task[:57]}..."


def open_loop_tracks(track: EpisodeTrack) -> bytes:
    """Of one episode a row for each number of an action: recorded, and what the policy would have played."""
    numbers = track.recorded.shape[1]
    figure = Figure(figsize=(10, 1 + 0.9 * numbers), layout="constrained")
    rows = figure.subplots(numbers, 1, sharex=True, squeeze=False)[:, 0]
    for i, axes in enumerate(rows):
        axes.plot(track.recorded[:, i], color="black", linewidth=1, label="recorded")
        axes.plot(track.played[:, i], color=_COLOURS["failure"], linewidth=1, label="policy")
        axes.set_ylabel(str(i), rotation=0, labelpad=14)
        axes.tick_params(labelsize=7)
    rows[0].legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    rows[-1].set_xlabel("control step")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _axis(axes: Axes, x: int, texts: Sequence[str]) -> list[float]:
    """Draws a vertical axis with its values; where on it, in [0, 1], each run lies."""
    axes.axvline(x, color="black", linewidth=0.8)
    numbers = [value for value in map(number, texts) if value is not None]
    if len(numbers) == len(texts):
        logarithmic = min(numbers) > 0 and math.log10(max(numbers) / min(numbers)) > _DECADES
        scaled = np.log(numbers) if logarithmic else np.array(numbers)
        low, high = float(scaled.min()), float(scaled.max())
        places = [float(place) for place in (scaled - low) / ((high - low) or 1.0)]
        ticks = {f"{value:.3g}": place for value, place in zip(numbers, places, strict=True) if place in (0, 1)}
    else:
        known = sorted(set(texts))
        ticks = {text: i / max(len(known) - 1, 1) for i, text in enumerate(known)}
        places = [ticks[text] for text in texts]
    for text, place in ticks.items():
        axes.annotate(text[:_WIDEST], (x, place), (3, 3), textcoords="offset points", fontsize=8)
    return places


def _error(run: TrackedRun, metric: str) -> npt.NDArray[np.float64] | None:
    interval = run.interval(metric)
    return interval and whiskers([run.metrics[metric]], [interval])


def _with_ends(runs: Sequence[TrackedRun], metric: str) -> str:
    return f"{metric} (with its interval)" if any(run.interval(metric) for run in runs) else metric
