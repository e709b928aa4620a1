"""Tracked runs side by side: the metrics that they share, and the parameters in which they differ."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from evaluators.tracked_runs import FINGERPRINT, TrackedRun, labels
from ipvla.storage import StorageRoots

#: What a comparison is about, in this order.
RESULTS: Final = ("forgetting/", "success/", "probe/", "gain/")
#: A run's place, its name and its planned length say nothing about its method.
_OWN = {*StorageRoots.__dataclass_fields__, "name", "study", "parent_run_id", "parent_run_key", "training.until"}
_ASIDE = (FINGERPRINT, "tracking.")
_LONGEST = 32  # characters of a value on the console
_ABREAST = 4  # so many runs are columns, more are rows


@dataclass(frozen=True)
class RunTable:
    """The columns and rows of the table.

    Attributes:
        metrics: names without `/low` and `/high`, which are shown with them.
        parameters: dotted names.
    """

    runs: tuple[TrackedRun, ...]
    metrics: tuple[str, ...]
    parameters: tuple[str, ...]

    def console(self, width: int, title: str = "") -> Group:
        """A run per row, or per column if they are few; several tables, if one would be wider than that."""
        headings, rows = self._cells()
        columns = list(zip(headings, *rows, strict=True))
        if len(rows) <= _ABREAST:
            columns = list(zip(*columns, strict=True))
        first, *rest = columns
        blocks = [[first]]
        for column in rest:
            if len(blocks[-1]) > 1 and _width([*blocks[-1], column]) > width:
                blocks.append([first])
            blocks[-1].append(column)
        return Group(*(_drawn(block, title) for block in blocks))

    def markdown(self) -> str:
        """A run per row."""
        headings, rows = self._cells()
        table = Table(*map(_cell, headings), box=box.MARKDOWN)
        for row in rows:
            table.add_row(*map(_cell, row))
        text = io.StringIO()
        Console(file=text, width=100_000).print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip()) + "\n"

    def csv(self) -> str:
        """A run per row, numbers as they are, interval ends in columns of their own."""
        metrics = [name for metric in self.metrics for name in self._with_ends(metric)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", "run_id", "study", "status", "wall_s", *self.parameters, *metrics])
        for run in self.runs:
            parameters = [run.params.get(name, "") for name in self.parameters]
            values = [run.metrics.get(name, "") for name in metrics]
            writer.writerow([run.name, run.run_id, run.study, run.status, run.wall_s, *parameters, *values])
        return text.getvalue()

    def json(self) -> str:
        """Every run whole: all parameters, all latest values; null for what is no number."""
        record = {
            "metrics": self.metrics,
            "parameters": self.parameters,
            "runs": [
                asdict(run) | {"metrics": {k: v if math.isfinite(v) else None for k, v in run.metrics.items()}}
                for run in self.runs
            ],
        }
        return json.dumps(record, indent=1)

    def write(self, directory: Path) -> list[Path]:
        """`runs.md`, `runs.csv` and `runs.json`."""
        texts = {"md": self.markdown(), "csv": self.csv(), "json": self.json()}
        files = [directory / f"runs.{kind}" for kind in texts]
        for file, text in zip(files, texts.values(), strict=True):
            file.write_text(text)
        return files

    def _with_ends(self, metric: str) -> list[str]:
        known = {name for run in self.runs for name in run.metrics}
        return [name for name in (metric, f"{metric}/low", f"{metric}/high") if name in known]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        headings = ["run", "status", "wall", *self.metrics, *short_names(self.parameters)]
        rows = [
            [
                label,
                run.status,
                duration(run.wall_s),
                *(metric_cell(run, metric) for metric in self.metrics),
                *(_parameter(run, name) for name in self.parameters),
            ]
            for label, run in zip(labels(self.runs), self.runs, strict=True)
        ]
        return headings, rows


def shared_metrics(runs: Sequence[TrackedRun]) -> list[str]:
    """Names of the results that at least two runs have (of a single one, all); coarse ones before fine ones."""
    counts = Counter(name for run in runs for name in run.metrics)
    found = [
        name for name in without_ends(counts) if name.startswith(RESULTS) and counts[name] >= min(len(runs), 2)
    ]
    kinds = {name: next(i for i, prefix in enumerate(RESULTS) if name.startswith(prefix)) for name in found}
    return sorted(found, key=lambda name: (name.count("/"), kinds[name], name))


def opposed(metrics: Sequence[str]) -> tuple[str, str] | None:
    """The metrics of a new task and of retention by their names; else the first two. None if there are not two."""
    retention = [name for name in metrics if name.endswith(("/bwt", "/old", "/retention"))]
    new = [name for name in metrics if name.endswith("/new")]
    up = [*retention, *metrics[1:]]
    across = [name for name in (*new, *metrics) if up and name != up[0]]
    return (across[0], up[0]) if across else None


def without_ends(metrics: Iterable[str]) -> list[str]:
    """All but the ends of intervals."""
    known = list(dict.fromkeys(metrics))
    ends = {f"{name}/{end}" for name in known for end in ("low", "high")}
    return [name for name in known if name not in ends]


def differing_parameters(runs: Sequence[TrackedRun]) -> list[str]:
    """Dotted names with at least two values among the runs that have them.

    A group that some runs have and for others is None, such as `forgetting`, counts as one parameter more.
    """
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.params.items():
            if name not in _OWN and not name.startswith(_ASIDE):
                values.setdefault(name, set()).add(value)
    parents = {name[:dot] for name in values for dot, mark in enumerate(name) if mark == "."}
    groups = {name for name, found in values.items() if found == {"None"} and name in parents}
    return [name for name, found in values.items() if len(found) > 1 or name in groups]


def short_names(names: Sequence[str]) -> list[str]:
    """Each name's last parts, as many as make it unique: `thermostat.every` and `calibration.every`."""
    parts = [name.split(".") for name in names]
    shortened = []
    for own in parts:
        ends = (own[-length:] for length in range(1, len(own)))
        shortened.append(
            ".".join(next((end for end in ends if sum(o[-len(end) :] == end for o in parts) == 1), own))
        )
    return shortened


def metric_cell(run: TrackedRun, metric: str) -> str:
    """E.g. `0.90 (0.84-0.95)`; without an interval four digits; a dash if there is no value."""
    if metric not in run.metrics:
        return "-"
    interval = run.interval(metric)
    if interval is None:
        return f"{run.metrics[metric]:.4g}"
    low, high = interval
    return f"{run.metrics[metric]:.2f} ({low:.2f}{' to ' if low < 0 else '-'}{high:.2f})"


def duration(seconds: float) -> str:
    """E.g. `7 s`, `3:05`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not (hours or minutes):
        return f"{rest} s"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(text: str | None) -> float | None:
    """A parameter's value, if it is a finite number."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _parameter(run: TrackedRun, name: str) -> str:
    if name not in run.params:
        return "given" if any(other.startswith(f"{name}.") for other in run.params) else "-"
    value = run.params[name]
    as_number = number(value)
    if as_number is not None and not value.lstrip("-").isdigit():
        return f"{as_number:.4g}"
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}..."


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Characters of their table: a rule and two blanks go with every column, less the blanks at the edges."""
    return sum(max(map(len, column)) + 3 for column in columns) - 1


def _drawn(columns: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=escape(title) or None, pad_edge=False)
    for number, (heading, *_) in enumerate(columns):
        table.add_column(escape(heading), justify="right" if number else "left", overflow="fold")
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*map(escape, row))
    return table


def _cell(text: str) -> str:
    return escape(text.replace("|", "\\|"))
