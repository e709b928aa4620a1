"""Success lost against the control step at which the memory was changed, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from evaluators.memory_use import LossRow, MemoryUse

_COLUMNS = 3
_DODGE = 0.012  # of the width: intervals at the same t stand side by side


def write_plot(use: MemoryUse, path: Path) -> list[Path]:
    """Writes one panel per family, one line with 95 % intervals per probe, as `path`.png and `path`.svg."""
    families = list(dict.fromkeys(row.name for row in use.families))
    probes = list(dict.fromkeys(row.intervention for row in use.families))
    columns = min(_COLUMNS, len(families))
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
                yerr=_distances(rows),
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


def _distances(rows: Sequence[LossRow]) -> list[list[float]]:
    """Below and above each point, as matplotlib wants them."""
    limits = [(row.lost - row.lost95[0], row.lost95[1] - row.lost) for row in rows]
    return [[below for below, _ in limits], [above for _, above in limits]]
