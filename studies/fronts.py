"""The forgetting benchmark's figures and targets: whole trade-offs, compared on the same seeds and layouts.

Success is a mean over families of means over their tasks, however many layouts a task was played on.

All policies are drawn again together: one draw takes the same seeds and layouts from every method, so whatever is
computed from it is paired. A seed that is drawn brings the layouts that it alone played: to draw these again would
count their chance twice. Layouts that several seeds played are drawn too, within their task, and those that only
some policies played apart from the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.forgetting_archive import decode, encode
from benchmarks.forgetting_outcomes import Comparison, Played, Point, Skill
from benchmarks.forgetting_response import joined_responses
from benchmarks.forgetting_sequence import joined_sequences
from benchmarks.record import Target
from evaluators.forgetting import Estimate, FloatArray, interval, mean_over_seeds
from evaluators.pareto import Box, area, front, retention_at

#: The same for every method.
BOX: Final = Box(new=(0.0, 1.0), old=(0.0, 1.0))
#: What the baseline forgets must be at least this, and its interval above 0, or it is too little to divide by.
LEAST_DENOMINATOR: Final = 0.02


def figures(comparison: Comparison, draws: int = 2000) -> dict[str, Any]:
    """All figures of a comparison, as JSON values; `comparison` itself lies under `played`.

    An estimate is {"value", "low", "high"}: a 95 % interval from `draws` draws of seeds and layouts, null of a
    single seed.
    """
    drawn = Drawn(comparison, draws)
    rivals = [n for n, entry in comparison.methods.items() if entry.role in ("baseline", "rival") and entry.frugal]
    return {
        "seeds": list(comparison.seeds),
        "ours": comparison.ours,
        "baseline": comparison.baseline,
        "best_rival": max(rivals, key=lambda name: float(drawn.areas[name][0])) if rivals else None,
        "question_chance": comparison.question_chance,
        "base": _policy(drawn, None),
        "methods": {name: _method(drawn, name) for name in comparison.methods},
        "loop": _loop(drawn),
        "played": encode(comparison),
    }


def joined(earlier: Mapping[str, Any], later: Mapping[str, Any], draws: int = 2000) -> dict[str, Any]:
    """Figures of two sessions of one recipe, made anew from what both played, `sequence` and `response` included.

    All else is as `later` has it, or as `earlier` where that has none.

    Raises:
        ValueError: the sessions are not of one recipe, see `Comparison.joined` and what joins the others.
    """
    sessions = [decode(session["played"]) for session in (earlier, later)]
    rest = {**earlier, **{name: figure for name, figure in later.items() if figure is not None}}
    if earlier.get("sequence") and later.get("sequence"):
        rest["sequence"] = joined_sequences(earlier["sequence"], later["sequence"])
    if earlier.get("response") and later.get("response"):
        rest["response"] = joined_responses(earlier["response"], later["response"])
    return {**rest, **figures(sessions[0].joined(sessions[1]), draws)}


@dataclass(frozen=True)
class Drawn:
    """Every policy's success in every draw; draw 0 is what was played.

    Attributes:
        comparison: what is drawn from.
        draws: beside draw 0, at least 1.
        seed: of the draws.
    """

    comparison: Comparison
    draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; give at least 1, 2000 for figures to be published")

    @cached_property
    def families(self) -> dict[str, dict[str, FloatArray]]:
        """Of "new" and "old": family -> float64 [draws + 1, policies]; policy 0 is the base, then the points."""
        rng = np.random.default_rng(self.seed)
        count = len(self.comparison.seeds)
        of_seeds = _weights(rng, np.zeros(count, np.int64), self.draws) / count
        return {part: self._success(part, rng, of_seeds) for part in ("new", "old")}

    @cached_property
    def points(self) -> FloatArray:
        """(new-task success, retention) of every policy: float64 [draws + 1, policies, 2]."""
        return np.stack([np.mean(list(self.families[part].values()), axis=0) for part in ("new", "old")], axis=-1)

    @cached_property
    def areas(self) -> dict[str, FloatArray]:
        """Method -> area under its front, float64 [draws + 1]."""
        methods = self.comparison.methods
        return {name: self.area(self.comparison.points_of(name)) for name in methods}

    def area(self, points: Iterable[Point]) -> FloatArray:
        """Under the front of these points, float64 [draws + 1]."""
        return np.array([area(drawn, BOX) for drawn in self.of(points)])

    def of(self, points: Iterable[Point]) -> FloatArray:
        """float64 [draws + 1, P, 2]."""
        return self.points[:, [self.place(point) for point in points]]

    def place(self, point: Point | None) -> int:
        """Of a point among the policies; None for the base."""
        return 0 if point is None else 1 + self._places[point]

    def estimate(self, values: FloatArray) -> dict[str, float | None]:
        """Of values in every draw, [draws + 1]."""
        return _rounded(interval(float(values[0]), values[1:], len(self.comparison.seeds)))

    @cached_property
    def _places(self) -> dict[Point, int]:
        return {point: place for place, point in enumerate(self.comparison.points)}

    def _success(self, part: str, rng: np.random.Generator, of_seeds: FloatArray) -> dict[str, FloatArray]:
        skills: Mapping[str, Skill] = getattr(self.comparison, part)
        tasks: dict[str, list[FloatArray]] = {skill.family: [] for skill in skills.values()}
        for task, skill in skills.items():
            outcomes = self._outcomes(part, task)
            policies, seeds, layouts = outcomes.shape
            cells = outcomes.reshape(policies * seeds, layouts)
            played = ~np.isnan(cells)
            _, alike = np.unique(played, axis=1, return_inverse=True)  # layouts that the same policies played
            shared = played.reshape(outcomes.shape).any(0).sum(0) > 1
            weights = _weights(rng, np.where(shared, alike.reshape(-1), -1), self.draws)
            rates = (weights @ np.nan_to_num(cells).T) / (weights @ played.T)
            tasks[skill.family].append((rates.reshape(-1, policies, seeds) * of_seeds[:, None]).sum(-1))
        return {family: np.mean(rates, axis=0) for family, rates in tasks.items()}

    def _outcomes(self, part: str, task: str) -> FloatArray:
        """1, 0, or NaN where not played: [policies, seeds, layouts]."""
        policies = [self.comparison.base, *self.comparison.points.values()]
        played = [[getattr(policy[seed], part)[task] for seed in self.comparison.seeds] for policy in policies]
        layouts = sorted({layout for seeds in played for outcomes in seeds for layout in outcomes})
        return np.array(
            [[[outcomes.get(i, math.nan) for i in layouts] for outcomes in seeds] for seeds in played], np.float64
        )


def forgetting_at_equal_success(drawn: Drawn, first: str, second: str) -> FloatArray:
    """What two methods forget at the same new-task success: float64 [draws + 1, 3], that success, then each's.

    The success is the largest that both fronts reach; in every draw it is that draw's own.
    Forgetting is the base's retention minus the front's there, in [-1, 1].
    """
    base = drawn.points[:, 0, 1]
    fronts = zip(*(drawn.of(drawn.comparison.points_of(name)) for name in (first, second)), strict=True)
    rows = []
    for kept, (one, two) in zip(base, fronts, strict=True):
        level = min(one[:, 0].max(), two[:, 0].max())
        rows.append((level, kept - retention_at(one, level), kept - retention_at(two, level)))
    return np.array(rows)


def _method(drawn: Drawn, name: str) -> dict[str, Any]:
    comparison = drawn.comparison
    entry, points = comparison.methods[name], comparison.points_of(name)
    means = drawn.of(points)[0]
    best = {tuple(point) for point in front(means).tolist()}
    others = [other for other in comparison.methods if other != name]
    return {
        "role": entry.role,
        "uses": list(entry.uses),
        "final": {**_at(entry.final), **_policy(drawn, entry.final)},
        "points": [
            {**_at(p), **_point(drawn, p), "on_front": tuple(mean) in best}
            for p, mean in zip(points, means.tolist(), strict=True)
        ],
        "area": drawn.estimate(drawn.areas[name]),
        "gaps": {other: drawn.estimate(drawn.areas[name] - drawn.areas[other]) for other in others},
        "equal_success": None if name == comparison.baseline else _equal_success(drawn, name),
    }


def _equal_success(drawn: Drawn, name: str) -> dict[str, Any]:
    baseline = drawn.comparison.baseline
    level, forgets, theirs = forgetting_at_equal_success(drawn, name, baseline).T
    told = {"new": level, "forgets": forgets, "baseline_forgets": theirs, "saved": theirs - forgets}
    estimates: dict[str, Any] = {kind: drawn.estimate(values) for kind, values in told.items()}
    return {**estimates, **_ratio(drawn, forgets, theirs, baseline)}


def _ratio(drawn: Drawn, forgets: FloatArray, theirs: FloatArray, baseline: str) -> dict[str, Any]:
    """The ratio of what is forgotten; None and why, where the baseline forgets too little to divide by.

    In a few draws it may still forget nothing; these count as the largest ratio of the others.
    """
    denominator = drawn.estimate(theirs)
    value, low = float(theirs[0]), denominator["low"]
    if value < LEAST_DENOMINATOR or (low is not None and low <= 0):
        around = "" if low is None else f" ({low:.3f} to {denominator['high']:.3f})"
        return {"ratio": None, "why": f"{baseline} forgets {value:.3f}{around} there, too little to divide by"}
    some = theirs > 0
    ratios = np.where(some, forgets / np.where(some, theirs, 1.0), -np.inf)
    return {"ratio": drawn.estimate(np.where(some, ratios, ratios.max())), "why": None}


def _policy(drawn: Drawn, point: Point | None) -> dict[str, Any]:
    """All estimates of one policy."""
    comparison, place = drawn.comparison, drawn.place(point)
    played = comparison.base if point is None else comparison.points[point]
    parts = {part: drawn.estimate(drawn.points[:, place, axis]) for axis, part in enumerate(("new", "old"))}
    episodes = {
        part: sum(len(outcomes) for policy in played.values() for outcomes in getattr(policy, part).values())
        for part in ("new", "old")
    }
    return {
        **parts,
        "families": {f: drawn.estimate(rates[:, place]) for f, rates in drawn.families["old"].items()},
        **{name: _over_seeds(played, of) for name, of in _OTHERS.items()},
        "episodes": episodes,
    }


def _point(drawn: Drawn, point: Point) -> dict[str, Any]:
    """The same in short: intervals of the two axes alone."""
    everything = _policy(drawn, point)
    values = {name: everything[name] and everything[name]["value"] for name in _OTHERS}
    families = {family: estimate["value"] for family, estimate in everything["families"].items()}
    return {"new": everything["new"], "old": everything["old"], "families": families, **values}


_OTHERS: Mapping[str, Callable[[Played], float | None]] = {
    "questions": lambda played: played.accuracy,
    "kl": lambda played: played.kl,
    "drift": lambda played: played.drift,
}


def _over_seeds(
    played: Mapping[int, Played], of: Callable[[Played], float | None]
) -> dict[str, float | None] | None:
    """Mean over the seeds, with an interval; None if it was not measured in every one."""
    values = [of(policy) for policy in played.values()]
    known = [value for value in values if value is not None]
    return _rounded(mean_over_seeds(np.array(known, np.float64))) if len(known) == len(values) else None


def _loop(drawn: Drawn) -> dict[str, Any] | None:
    """The closed loop against what its trace is worth without readings: one run each, the final point's.

    Areas are of checkpoints that both runs were played at, so neither has more points to choose from. The best
    constant was chosen with its checkpoint: it and the loop are compared at their final points.
    """
    comparison = drawn.comparison
    if not comparison.loop:
        return None
    rows = {}
    for kind, name in comparison.loop.items():
        ahead, behind = map(drawn.area, _compared(comparison, kind))
        final = drawn.place(comparison.methods[name].final)
        rows[kind] = {
            "method": name,
            "checkpoints": len(_compared(comparison, kind)[1]),
            "new": drawn.estimate(drawn.points[:, final, 0]),
            "old": drawn.estimate(drawn.points[:, final, 1]),
            "area": drawn.estimate(behind),
            "gain": None if kind == "closed" else drawn.estimate(ahead - behind),
        }
    return rows


def _compared(comparison: Comparison, kind: str) -> tuple[list[Point], list[Point]]:
    """Points of the closed loop, and of what it is compared with."""
    closed, name = comparison.loop["closed"], comparison.loop[kind]
    if kind == "constant":
        return [comparison.methods[closed].final], [comparison.methods[name].final]
    runs = comparison.run_of(closed), comparison.run_of(name)
    shared = {p.checkpoint for p in runs[0]} & {p.checkpoint for p in runs[1]}
    if not shared:
        raise ValueError(f"{name} and {closed} share no checkpoint; play both at the same ones")
    ahead, behind = ([p for p in run if p.checkpoint in shared] for run in runs)
    return ahead, behind


def _reading(costs: Mapping[str, Any]) -> str:
    if "reading_ms" not in costs:
        return ""
    share = costs["reading_ms"] / costs["method_ms"]
    return f"a reading takes {share:.2f} of a training step, and is taken every {costs['every']} steps here"


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, from `figures`; `costs` in it, if there, holds the two ratios as estimates."""
    methods, ours, rival, baseline = (figures[name] for name in ("methods", "ours", "best_rival", "baseline"))
    costs: Mapping[str, Any] = figures.get("costs") or {}
    equal = methods[ours]["equal_success"]
    at = f"{ours} against {baseline} at a new-task success of {equal['new']['value']:.2f}"
    loop: Mapping[str, Any] = figures.get("loop") or {}
    closed = f"{loop['closed']['method']} against {loop['shuffled']['method']}" if loop else ""
    return [
        _target("hsw_step_ratio", costs.get("hsw_step_ratio"), 1.05),
        _target("thermostat_step_ratio", costs.get("thermostat_step_ratio"), 1.02, note=_reading(costs)),
        _target(
            "forgetting_ratio_to_lora",
            equal["ratio"],
            0.5,
            note=at if equal["why"] is None else f"{at}: {equal['why']}",
        ),
        _target(
            "front_area_gap_to_best_rival",
            methods[ours]["gaps"][rival] if rival else None,
            0.0,
            at_least=True,
            note=f"{ours} against {rival}" if rival else "no rival without replay and extra loss was played",
        ),
        _target(
            "closed_loop_gain_over_shuffled",
            loop["shuffled"]["gain"] if loop else None,
            0.0,
            at_least=True,
            beyond=True,
            note=closed,
        ),
    ]


def _target(
    name: str,
    estimate: Mapping[str, float | None] | None,
    bound: float,
    at_least: bool = False,
    beyond: bool = False,
    note: str = "",
) -> Target:
    if estimate is None or estimate["value"] is None:
        return Target(name, None, bound, at_least, beyond, note=note or "not measured")
    low, high = estimate["low"], estimate["high"]
    known = None if low is None or high is None else (low, high)
    return Target(name, estimate["value"], bound, at_least, beyond, known, note)


def _weights(rng: np.random.Generator, strata: npt.NDArray[np.int64], draws: int) -> FloatArray:
    """How often each of n things is drawn, with replacement within its stratum [n]: float64 [draws + 1, n].

    Draw 0 takes each once, and stratum -1 is always taken as it is.
    """
    weights = np.ones((draws + 1, len(strata)))
    for stratum in np.unique(strata[strata >= 0]):
        members = np.flatnonzero(strata == stratum)
        weights[1:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
    return weights


def _at(point: Point) -> dict[str, Any]:
    return {"strength": point.strength, "checkpoint": point.checkpoint}


def _rounded(estimate: Estimate) -> dict[str, float | None]:
    """Four significant digits, None for NaN."""
    told = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if math.isnan(value) else float(f"{value:.4g}") for name, value in told.items()}
