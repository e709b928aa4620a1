"""The forgetting benchmark's Pareto plot: success on the new task against success on the old skills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Legend heading -> colours from first to last method.
_COLOURS: Final[Mapping[str, str]] = {
    "ours": "Blues",
    "rivals": "Greens",
    "rivals with replay or an extra loss": "Oranges",
    "controls": "Greys",
}
_MARKERS: Final = "osD^v<>Xph*P"


def plot_fronts(figures: Mapping[str, Any], path: Path) -> None:
    """A line with markers for each method's front, its other points faint, the base dashed; PNG.

    Final points are larger, with intervals on both axes where there are several training seeds.
    """
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    panel = figure.subplots()
    kept = figures["base"]["old"]["value"]
    base = panel.axhline(kept, color="black", linestyle="--", linewidth=1)
    handles: list[Any] = [base]
    labels = ["before fine-tuning"]
    for heading, names in groups(figures["methods"]).items():
        handles.append(panel.plot([], [], linestyle="none")[0])
        labels.append(heading)
        shades = mpl.colormaps[_COLOURS[heading]]
        for place, name in enumerate(names):
            shade = shades(0.9 - 0.5 * place / max(len(names) - 1, 1))
            handles.append(_draw(panel, figures["methods"][name], shade, _MARKERS[place % len(_MARKERS)]))
            labels.append(name)
    panel.set_xlabel("success on the new task, held-out layouts")
    panel.set_ylabel("success on the old skills, held-out layouts")
    panel.grid(alpha=0.3)
    legend = figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    for text in legend.get_texts():
        if text.get_text() in _COLOURS:
            text.set_fontweight("bold")
            text.set_x(-24)  # where the headings' empty handles would stand
    figure.savefig(path, dpi=130)


def groups(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Legend heading -> its methods, those headings alone that have some."""
    members: dict[str, list[str]] = {heading: [] for heading in _COLOURS}
    for name, method in methods.items():
        dear = {"loss", "replay"} & set(method["uses"])
        rivals = "rivals with replay or an extra loss" if dear else "rivals"
        members[{"ours": "ours", "control": "controls"}.get(method["role"], rivals)].append(name)
    return {heading: names for heading, names in members.items() if names}


def _draw(panel: Axes, method: Mapping[str, Any], colour: Any, marker: str) -> Any:
    front = sorted((p for p in method["points"] if p["on_front"]), key=lambda p: p["new"]["value"])
    behind = [p for p in method["points"] if not p["on_front"]]
    panel.plot(*_places(behind), linestyle="none", marker=marker, markersize=3, color=colour, alpha=0.25)
    (line,) = panel.plot(*_places(front), marker=marker, markersize=4.5, linewidth=1.3, color=colour)
    final = method["final"]
    new, old = final["new"], final["old"]
    panel.errorbar(
        new["value"],
        old["value"],
        xerr=_reach(new),
        yerr=_reach(old),
        marker=marker,
        markersize=9,
        markeredgecolor="black",
        markeredgewidth=0.8,
        color=colour,
        ecolor=(colour, 0.5),
        elinewidth=0.8,
    )
    return line


def _places(points: list[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [p["new"]["value"] for p in points], [p["old"]["value"] for p in points]


def _reach(estimate: Mapping[str, Any]) -> list[list[float]] | None:
    """How far the interval reaches down and up; a bootstrap interval may just miss its value."""
    if estimate["low"] is None:
        return None
    value = estimate["value"]
    return [[max(value - estimate["low"], 0.0)], [max(estimate["high"] - value, 0.0)]]
