"""The forgetting study's figures, targets and plot: whole trade-offs, compared on the same seeds and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators.archive import decode, encode
from evaluators.forgetting import joined_sequences, mean_over_seeds
from evaluators.pareto import front
from evaluators.plots import whiskers
from evaluators.step_response import joined_responses
from evaluators.tradeoffs import Comparison, Drawn, Point, forgetting_at_equal_success, rounded
from studies.record import Target

#: What the baseline forgets must be at least this, and its interval above 0, or it is too little to divide by.
LEAST_DENOMINATOR: Final = 0.02
_OTHERS: Final = {"questions": "accuracy", "kl": "kl", "drift": "drift"}


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
    one, other = (decode(session["played"]) for session in (earlier, later))
    rest = {**earlier, **{name: figure for name, figure in later.items() if figure is not None}}
    for part, join in {"sequence": joined_sequences, "response": joined_responses}.items():
        if earlier.get(part) and later.get(part):
            rest[part] = join(earlier[part], later[part])
    return {**rest, **figures(one.joined(other), draws)}


def _method(drawn: Drawn, name: str) -> dict[str, Any]:
    comparison = drawn.comparison
    entry, points = comparison.methods[name], comparison.points_of(name)
    means = drawn.of(points)[0]
    best = {tuple(point) for point in front(means).tolist()}
    others = [other for other in comparison.methods if other != name]

    def at(point: Point) -> dict[str, Any]:
        return {"strength": point.strength, "checkpoint": point.checkpoint}

    def in_short(point: Point) -> dict[str, Any]:
        """Intervals of the two axes alone."""
        everything = _policy(drawn, point)
        values = {of: everything[of] and everything[of]["value"] for of in _OTHERS}
        families = {family: estimate["value"] for family, estimate in everything["families"].items()}
        return {"new": everything["new"], "old": everything["old"], "families": families, **values}

    return {
        "role": entry.role,
        "uses": list(entry.uses),
        "final": {**at(entry.final), **_policy(drawn, entry.final)},
        "points": [
            {**at(p), **in_short(p), "on_front": tuple(mean) in best}
            for p, mean in zip(points, means.tolist(), strict=True)
        ],
        "area": drawn.estimate(drawn.areas[name]),
        "gaps": {other: drawn.estimate(drawn.areas[name] - drawn.areas[other]) for other in others},
        "equal_success": None if name == comparison.baseline else _equal_success(drawn, name),
    }


def _equal_success(drawn: Drawn, name: str) -> dict[str, Any]:
    """What is forgotten at equal success, and its ratio; None and why, where the baseline forgets too little.

    In a few draws the baseline may still forget nothing; these count as the largest ratio of the others.
    """
    baseline = drawn.comparison.baseline
    level, forgets, baseline_forgets = forgetting_at_equal_success(drawn, name, baseline).T
    drawn_values = {
        "new": level,
        "forgets": forgets,
        "baseline_forgets": baseline_forgets,
        "saved": baseline_forgets - forgets,
    }
    estimates: dict[str, Any] = {kind: drawn.estimate(values) for kind, values in drawn_values.items()}
    value, low = float(baseline_forgets[0]), estimates["baseline_forgets"]["low"]
    if value < LEAST_DENOMINATOR or (low is not None and low <= 0):
        around = "" if low is None else f" ({low:.3f} to {estimates['baseline_forgets']['high']:.3f})"
        why = f"{baseline} forgets {value:.3f}{around} there, too little to divide by"
        return {**estimates, "ratio": None, "why": why}
    some = baseline_forgets > 0
    ratios = np.where(some, forgets / np.where(some, baseline_forgets, 1.0), -np.inf)
    return {**estimates, "ratio": drawn.estimate(np.where(some, ratios, ratios.max())), "why": None}


def _policy(drawn: Drawn, point: Point | None) -> dict[str, Any]:
    """All estimates of one policy."""
    comparison, place = drawn.comparison, drawn.place(point)
    played = (comparison.base if point is None else comparison.points[point]).values()

    def over_seeds(of: str) -> dict[str, float | None] | None:
        """Mean, with an interval; None if it was not measured in every seed."""
        known = [value for policy in played if (value := getattr(policy, of)) is not None]
        return rounded(mean_over_seeds(np.array(known, np.float64))) if len(known) == len(played) else None

    return {
        **{part: drawn.estimate(drawn.points[:, place, axis]) for axis, part in enumerate(("new", "old"))},
        "families": {f: drawn.estimate(rates[:, place]) for f, rates in drawn.families["old"].items()},
        **{name: over_seeds(of) for name, of in _OTHERS.items()},
        "episodes": {part: sum(policy.episodes[part] for policy in played) for part in ("new", "old")},
    }


def _loop(drawn: Drawn) -> dict[str, Any] | None:
    """The closed loop against what its trace is worth without readings: one run each, the final point's.

    Areas are of checkpoints that both runs were played at, so neither has more points to choose from. The best
    constant was chosen with its checkpoint: it and the loop are compared at their final points.
    """
    comparison, rows = drawn.comparison, {}
    for kind, name in comparison.loop.items():
        runs = _compared(comparison, kind)
        ahead, behind = map(drawn.area, runs)
        final = drawn.points[:, drawn.place(comparison.methods[name].final)]
        rows[kind] = {
            "method": name,
            "checkpoints": len(runs[1]),
            "new": drawn.estimate(final[:, 0]),
            "old": drawn.estimate(final[:, 1]),
            "area": drawn.estimate(behind),
            "gain": None if kind == "closed" else drawn.estimate(ahead - behind),
        }
    return rows or None


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


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What was promised, from `figures`; `costs` in it, if there, holds the two ratios as estimates."""
    methods, ours, rival, baseline = (figures[name] for name in ("methods", "ours", "best_rival", "baseline"))
    costs: Mapping[str, Any] = figures.get("costs") or {}
    loop: Mapping[str, Any] = figures.get("loop") or {}
    equal = methods[ours]["equal_success"]
    at = f"{ours} against {baseline} at a new-task success of {equal['new']['value']:.2f}"
    reading = closed = ""
    if "reading_ms" in costs:
        share = costs["reading_ms"] / costs["method_ms"]
        reading = f"a reading takes {share:.2f} of a training step, and is taken every {costs['every']} steps here"
    if loop:
        closed = f"{loop['closed']['method']} against {loop['shuffled']['method']}"

    why = at if equal["why"] is None else f"{at}: {equal['why']}"
    gap = methods[ours]["gaps"][rival] if rival else None
    against = f"{ours} against {rival}" if rival else "no rival without replay and extra loss was played"
    gain = loop["shuffled"]["gain"] if loop else None
    return [
        Target.of("hsw_step_ratio", costs.get("hsw_step_ratio"), 1.05),
        Target.of("thermostat_step_ratio", costs.get("thermostat_step_ratio"), 1.02, note=reading),
        Target.of("forgetting_ratio_to_lora", equal["ratio"], 0.5, note=why),
        Target.of("front_area_gap_to_best_rival", gap, 0.0, True, against),
        replace(Target.of("closed_loop_gain_over_shuffled", gain, 0.0, True, closed), beyond=True),
    ]


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
    base = panel.axhline(figures["base"]["old"]["value"], color="black", linestyle="--", linewidth=1)
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
    places = [[[p[axis]["value"] for p in points] for axis in ("new", "old")] for points in (behind, front)]
    panel.plot(*places[0], linestyle="none", marker=marker, markersize=3, color=colour, alpha=0.25)
    (line,) = panel.plot(*places[1], marker=marker, markersize=4.5, linewidth=1.3, color=colour)
    new, old = (method["final"][axis] for axis in ("new", "old"))
    large: dict[str, Any] = {"markersize": 9, "markeredgecolor": "black", "markeredgewidth": 0.8}
    faint: dict[str, Any] = {"ecolor": (colour, 0.5), "elinewidth": 0.8}
    error: dict[str, Any] = {"xerr": _reach(new), "yerr": _reach(old)}
    panel.errorbar(new["value"], old["value"], **error, marker=marker, color=colour, **large, **faint)
    return line


def _reach(one: Mapping[str, Any]) -> Any:
    return None if one["low"] is None else whiskers([one["value"]], [(one["low"], one["high"])])
