"""Closed loop: what becomes of success when the same scene is played with another goal, or with other words.

Each measure is over episodes of the same scenes, on the same initial states:

- `own`: with the instruction of training;
- `other_goal`: with the instruction of another goal that the scene allows, success being this goal's;
- `old_goal`: in these same episodes, the scene's own goal was reached: who does not hear has it near `own`;
- `action`, `object`: with paraphrases of what is to be done, or of what with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from rich.table import Column, Table

from evaluators.console import success_cell
from evaluators.intervals import bootstrap_mean
from evaluators.success_table import SuccessRow, SuccessTable
from ipvla.files import write_text
from ipvla.sim.altered_tasks import SCENE_GOAL, goal_and_scene, scene_of, task_and_kind
from ipvla.sim.instructions.sets import DIFFICULTIES
from ipvla.types import EpisodeResult

OWN: Final = "own"
MEASURES: Final = (OWN, "other_goal", "old_goal", *DIFFICULTIES)
#: The scene of rows over all scenes.
ALL: Final = "all"


@dataclass(frozen=True)
class ListeningRow:
    """One measure in one scene, or in all.

    Attributes:
        counts: k reached the goal in n episodes; its name is the measure's.
        difference: to `own` on the initial states that both have played, in [-1, 1]; None of `own` itself, and
            where there are none.
        difference95: its bootstrap interval over initial states within scenes; None if no scene has two.
    """

    scene: str
    counts: SuccessRow
    difference: float | None = None
    difference95: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "scene": self.scene,
            "measure": self.counts.name,
            **self.counts.to_dict(),
            "difference": self.difference,
            "difference95": None if self.difference95 is None else list(self.difference95),
        }


@dataclass(frozen=True)
class Listening:
    """One policy's; rows of each scene, those of all last, within each by `MEASURES`."""

    policy: str
    rows: tuple[ListeningRow, ...]
    fingerprints: tuple[Mapping[str, str], ...]

    def overall(self, measure: str) -> ListeningRow:
        """Over all scenes. KeyError if it was not played."""
        for row in self.rows:
            if (row.scene, row.counts.name) == (ALL, measure):
                return row
        raise KeyError(measure)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with everything that the counts depend on."""
        return {"rows": [row.to_dict() for row in self.rows], "fingerprints": [*map(dict, self.fingerprints)]}

    def metrics(self, suite: str) -> dict[str, float]:
        """`listening/<suite>/<measure>[/<scene>]`, over all scenes with `/low`, `/high` and `/difference`."""
        metrics: dict[str, float] = {}
        for row in self.rows:
            name = f"listening/{suite}/{row.counts.name}"
            if row.scene != ALL:
                metrics[f"{name}/{row.scene}"] = row.counts.rate
                continue
            low, high = row.counts.wilson95
            metrics |= {name: row.counts.rate, f"{name}/low": low, f"{name}/high": high}
            if row.difference is not None:
                metrics[f"{name}/difference"] = row.difference
        return metrics


def listening(policy: str, tables: Sequence[SuccessTable]) -> Listening:
    """From the results of scenes' own tasks and of tasks that are made of them (`ipvla.sim.altered_tasks`).

    Raises:
        ValueError: there are no results.
    """
    results = [*chain.from_iterable(table.results for table in tables)]
    if not results:
        raise ValueError("there is no episode; play at least one")
    scenes = dict.fromkeys(scene_of(result.spec.task) for result in results)
    found = {scene: _reached([r for r in results if scene_of(r.spec.task) == scene]) for scene in scenes}
    rows = [row for scene, reached in found.items() for row in _rows(scene, [reached])]
    rows += _rows(ALL, [*found.values()])
    return Listening(policy, tuple(rows), tuple(table.fingerprint for table in tables))


def write_listening(found: Sequence[Listening], path: Path) -> Path:
    """Writes JSON: policy -> `Listening.to_dict`; whole or not at all."""
    return write_text(path, json.dumps({one.policy: one.to_dict() for one in found}, indent=1))


def listening_table(found: Listening) -> Table:
    """Scene x measure; below, each measure's difference to `own`."""
    by_scene: dict[str, dict[str, ListeningRow]] = {}
    for row in found.rows:
        by_scene.setdefault(row.scene, {})[row.counts.name] = row
    measures = [measure for measure in MEASURES if measure in by_scene[ALL]]
    columns = (Column("scene", overflow="fold"), *(Column(measure, overflow="fold") for measure in measures))
    table = Table(*columns, title=f"What {found.policy} does in scenes that it knows")
    for scene, of_scene in by_scene.items():
        cells = [success_cell(of_scene[name].counts) if name in of_scene else "-" for name in measures]
        table.add_row(scene, *cells, end_section=True)
    table.add_row("difference", *(_difference_cell(by_scene[ALL][measure]) for measure in measures))
    return table


#: Of one scene: measure -> seed -> whether each of its episodes reached the goal.
_Reached = Mapping[str, Mapping[int, Sequence[bool]]]


def _reached(results: Sequence[EpisodeResult]) -> _Reached:
    reached: dict[str, dict[int, list[bool]]] = {}
    for result in results:
        for measure, done in _judged(result).items():
            reached.setdefault(measure, {}).setdefault(result.spec.seed, []).append(done)
    return reached


def _judged(result: EpisodeResult) -> dict[str, bool]:
    if goal_and_scene(result.spec.task) is not None:
        return {"other_goal": result.success, "old_goal": bool(result.details[SCENE_GOAL])}
    said = task_and_kind(result.spec.task)
    return {OWN if said is None else said[1]: result.success}


def _rows(scene: str, found: Sequence[_Reached]) -> list[ListeningRow]:
    rows = []
    for measure in MEASURES:
        episodes = [done for reached in found for of_seed in reached.get(measure, {}).values() for done in of_seed]
        if not episodes:
            continue
        counts = SuccessRow(measure, sum(episodes), len(episodes), 0.0)
        changes = [
            [fmean(done) - fmean(own[seed]) for seed, done in reached[measure].items() if seed in own]
            for reached in found
            if (own := reached.get(OWN, {})) and measure in reached
        ]
        paired = [*chain.from_iterable(changes)]
        if measure == OWN or not paired:
            rows.append(ListeningRow(scene, counts))
        else:
            rows.append(ListeningRow(scene, counts, fmean(paired), bootstrap_mean(changes)))
    return rows


def _difference_cell(row: ListeningRow) -> str:
    if row.difference is None:
        return ""
    if row.difference95 is None:
        return f"{row.difference:+.2f}"
    low, high = row.difference95
    return f"{row.difference:+.2f} ({low:+.2f}, {high:+.2f})"
