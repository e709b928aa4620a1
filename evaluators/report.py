"""`report.html`: tables, comparisons, success bars, failure timeline, learning curves and videos, in one file."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluators.console import difference_cell, success_rows
from evaluators.episodes import Video
from evaluators.paired import PairedComparison
from evaluators.plots import failure_timeline, learning_curves, success_bars
from evaluators.success_table import SuccessTable
from ipvla.files import write_text


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        title: headline.
        note: one sentence under it, e.g. that this is a smoke run.
        tables: one per policy.
        comparisons: of pairs of policies.
        curves: run name -> its JSONL metrics.
        videos: linked relative to the report.
    """

    title: str
    tables: Sequence[SuccessTable]
    note: str = ""
    comparisons: Sequence[PairedComparison] = ()
    curves: Mapping[str, Path] = field(default_factory=dict)
    videos: Sequence[Video] = ()

    def write(self, path: Path) -> Path:
        """Writes the HTML, all images inline; it appears whole or not at all."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
        )
        html = environment.get_template("report.html.j2").render(
            report=self,
            sections=[(kind, success_rows(self.tables, kind)) for kind in ("families", "tasks")],
            bars=_inline(success_bars(self.tables)),
            timeline=_inline(failure_timeline(self.tables)),
            difference_cell=difference_cell,
            curves=_inline(learning_curves(self.curves)),
            timelines=[(video, _inline(video.timeline)) for video in self.videos if video.timeline],
            videos=[(video, os.path.relpath(video.path, path.parent)) for video in self.videos],
            fingerprints={table.policy: table.fingerprint for table in self.tables},
        )
        return write_text(path, html)


def _inline(png: bytes | None) -> str | None:
    return base64.b64encode(png).decode() if png else None
