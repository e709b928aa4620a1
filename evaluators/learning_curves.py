"""Metrics over steps, of several runs, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ipvla.tracking import read_jsonl

_COLUMNS = 2
_NAMED = 12  # lines that can be told apart


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
    rows = -(-len(drawn) // _COLUMNS)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for metric, panel in zip(drawn, panels, strict=False):
        for run, points in curves[metric].items():
            panel.plot(*zip(*points, strict=True), label=run, linewidth=1)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.grid(alpha=0.3)
        if len(curves[metric]) <= _NAMED:
            panel.legend(fontsize=8)
    for panel in panels:  # those left over
        panel.set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
