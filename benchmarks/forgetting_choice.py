"""Which points of each method are reported, chosen on the tuning seed alone, by one rule for all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forgetting_outcomes import Outcomes, Played, Point, Skill
from benchmarks.record import read_record, write_record
from evaluators.forgetting import FloatArray
from evaluators.pareto import Box, area

#: Points of a method that are reported, at most.
POINTS = 2
_RECORD = "forgetting_tuning"


@dataclass(frozen=True)
class Choice:
    """The outcome of tuning.

    Attributes:
        points: method -> its reported points, the final one first.
        areas: method -> area under its front on the tuning seed, of all points that it tried.
    """

    points: Mapping[str, tuple[Point, ...]]
    areas: Mapping[str, float]

    def final(self, method: str) -> Point:
        """The point that a user would take: the largest sum of new-task success and retention."""
        return self.points[method][0]

    def best(self, names: Sequence[str]) -> str:
        """Of these methods the one with the largest area."""
        return max(names, key=lambda name: self.areas[name])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        points = {name: [asdict(point) for point in chosen] for name, chosen in self.points.items()}
        return {"points": points, "areas": dict(self.areas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Choice:
        """What `to_dict` gave."""
        points = {name: tuple(Point(**point) for point in chosen) for name, chosen in values["points"].items()}
        return cls(points, values["areas"])


def choose(played: Mapping[Point, Played], new: Mapping[str, Skill], old: Mapping[str, Skill]) -> Choice:
    """From every point that was tried: the final one, then the one that adds most area under the front."""
    rates = {point: np.array([success(p.new, new), success(p.old, old)]) for point, p in played.items()}
    points, areas = {}, {}
    for method in dict.fromkeys(point.method for point in played):
        tried = {point: rate for point, rate in rates.items() if point.method == method}
        areas[method] = _area(list(tried.values()))
        chosen = [max(tried, key=lambda point: float(tried[point].sum()))]
        while len(chosen) < POINTS:
            gained = {p: _area([tried[q] for q in (*chosen, p)]) for p in tried if p not in chosen}
            best = max(gained, key=lambda point: gained[point], default=None)
            if best is None or gained[best] <= _area([tried[q] for q in chosen]):
                break
            chosen.append(best)
        points[method] = tuple(chosen)
    return Choice(points, areas)


def write_choice(choice: Choice, seed: int, played: Mapping[Point, Played]) -> Path:
    """`results/forgetting_tuning.json`: what was chosen, and the success of every point that was tried."""
    tried = [
        {**asdict(point), **{part: _counts(getattr(p, part)) for part in ("new", "old")}}
        for point, p in played.items()
    ]
    return write_record(_RECORD, [seed], {"choice": choice.to_dict(), "tried": tried}, [])


def read_choice() -> Choice:
    """What `write_choice` wrote. ValueError if nothing was chosen yet."""
    record = read_record(_RECORD)
    if record is None:
        raise ValueError("no points have been chosen yet; run python -m benchmarks.forgetting --tune true first")
    return Choice.from_dict(record["figures"]["choice"])


def _counts(outcomes: Outcomes) -> dict[str, str]:
    return {task: f"{sum(layouts.values())}/{len(layouts)}" for task, layouts in outcomes.items()}


def success(outcomes: Outcomes, skills: Mapping[str, Skill]) -> float:
    """Mean over families of means over their tasks, in [0, 1]."""
    families: dict[str, list[float]] = {}
    for task, skill in skills.items():
        families.setdefault(skill.family, []).append(float(np.mean(list(outcomes[task].values()))))
    return float(np.mean([np.mean(rates) for rates in families.values()]))


def _area(points: Sequence[FloatArray]) -> float:
    return area(np.stack(points), Box())
