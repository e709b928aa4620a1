"""Tracked runs as pictures: one metric against another, and parameters beside what they led to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from evaluators.run_table import number, short_names
from evaluators.tracked_runs import TrackedRun, labels

_NAMED = 12  # points that have room for their names
_DECADES = 1.0  # an axis of positive numbers that spans more is logarithmic
_WIDEST = 10  # characters of a value beside an axis


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
            xerr=_whiskers(run, x),
            yerr=_whiskers(run, y),
            fmt="o" if run.status == "finished" else "x",
            color=f"C{place % 10}" if len(pairs) <= _NAMED else "C0",
            elinewidth=0.8,
            alpha=0.8,
        )
        named.setdefault(at, []).append(label)
    for at, names in named.items() if len(pairs) <= _NAMED else ():
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


def _whiskers(run: TrackedRun, metric: str) -> list[list[float]] | None:
    interval = run.interval(metric)
    if interval is None:
        return None
    low, high = interval
    value = run.metrics[metric]
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _with_ends(runs: Sequence[TrackedRun], metric: str) -> str:
    return f"{metric} (with its interval)" if any(run.interval(metric) for run in runs) else metric
