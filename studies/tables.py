"""The forgetting benchmark's tables in Markdown, from its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

from benchmarks.markdown import head, line
from ipvla.forgetting.thermostat import ThermostatConfig

_NOT_YET = "Not measured yet."


def forgetting_tables(figures: Mapping[str, Any]) -> list[str]:
    """Those tables of `benchmarks.forgetting` that the figures are there for."""
    needs = {
        "bases": "played",
        "methods": "methods",
        "fronts": "methods",
        "sequence": "sequence",
        "loop": "loop",
        "response": "response",
        "step_costs": "costs",
    }
    return [FORGETTING[kind](figures) for kind, needed in needs.items() if figures.get(needed)]


def _methods(figures: Mapping[str, Any]) -> str:
    """The base, then every method's final point."""
    base, methods = figures["base"], figures["methods"]
    families = list(base["families"])
    rows = head("method", "takes", "new task", "old skills", *families, "questions", "KL", "drift d")
    rows.append(line("before fine-tuning", "", *_played_cells(base)))
    for name, method in methods.items():
        rows.append(line(name, ", ".join(_USES[use] for use in method["uses"]), *_played_cells(method["final"])))
    played = [base["episodes"], *(method["final"]["episodes"] for method in methods.values())]
    chance = figures["question_chance"]
    new, old = (_range(episodes[part] for episodes in played) for part in ("new", "old"))
    below = [
        f"{new} episodes of the new task and {old} of the old skills per row. {_over(figures)}.",
        *([f"Giving every question's most frequent answer: {chance:.2f}."] if chance is not None else []),
        "KL: of the teacher's and the student's actions on the probe, nats.",
    ]
    return "\n".join([*rows, "", " ".join(below)])


def _fronts(figures: Mapping[str, Any]) -> str:
    """The plot, which lies beside the page, and a row per method, the largest area first."""
    methods, ours, baseline = figures["methods"], figures["ours"], figures["baseline"]
    headings = (
        "points",
        "area under the front",
        f"{ours} minus it",
        f"equal new-task success with {baseline}",
        "forgets there",
        f"{baseline} forgets there",
        "ratio",
    )
    rows = head("method", *headings)
    for name, method in sorted(methods.items(), key=lambda item: -float(item[1]["area"]["value"])):
        gap = "" if name == ours else _estimate(methods[ours]["gaps"][name], signed=True)
        rows.append(line(name, str(len(method["points"])), _estimate(method["area"]), gap, *_equal_cells(method)))
    ratios = f"No ratio stands where {baseline} forgets too little to divide by."
    return "\n".join(
        ["![new task against old skills](forgetting.png)", "", *rows, "", f"{ratios} {_over(figures)}."]
    )


def choice_table(figures: Mapping[str, Any]) -> str:
    """Of `forgetting_tuning.json`: what is reported of each method, the largest area first."""
    choice = figures["choice"]
    tried = Counter(point["method"] for point in figures["tried"])
    rows = head("method", "points played", "area under the front", "final point", "second point")
    for name, area in sorted(choice["areas"].items(), key=lambda item: -float(item[1])):
        points = [f"{point['strength']} at {point['checkpoint']}" for point in choice["points"][name]]
        rows.append(line(name, str(tried[name]), f"{area:.2f}", points[0], ", ".join(points[1:])))
    return "\n".join(rows)


def _sequence(figures: Mapping[str, Any]) -> str:
    sequence = figures.get("sequence")
    if not sequence:
        return _NOT_YET
    measures = {name for method in sequence["methods"].values() for name in method["measures"]}
    shown = {name: heading for name, heading in _MEASURES.items() if name in measures}
    rows = head("method", *shown.values())
    for name, method in sequence["methods"].items():
        cells = (method["measures"].get(measure) for measure in shown)
        rows.append(line(name, *(_estimate(cell, signed=True) for cell in cells)))
    seeds = _range(len(method["seeds"]) for method in sequence["methods"].values())
    below = (
        f"Tasks in this order: {', '.join(sequence['tasks'])}; training seeds: {seeds}. LIBERO's measures from "
        "one evaluation per task, at the end of its training. R, mean over seeds:"
    )
    return "\n".join([*rows, "", below, "", *_scores(sequence)])


def _scores(sequence: Mapping[str, Any]) -> list[str]:
    """R, a row per method and trained task."""
    tasks = list(sequence["tasks"])
    rows = head("method", "after", *tasks)
    for name, method in sequence["methods"].items():
        for task, row in enumerate(zip(*(run["scores"] for run in method["seeds"].values()), strict=True)):
            cells = (f"{fmean(scores):.2f}" if None not in scores else "" for scores in zip(*row, strict=True))
            rows.append(line(name, tasks[task], *cells))
    return rows


def _bases(figures: Mapping[str, Any]) -> str:
    """What every seed's base policy could do: what there was to forget."""
    played = figures["played"]
    rows = head("training seed", *played["new"], *played["old"])
    for seed, policy in played["base"].items():
        cells = f"{policy['new']} {policy['old']}".split()  # in the order of the tasks
        rows.append(line(seed, *(cell.partition(":")[0] for cell in cells)))
    chances = (f"{skill['chance']:.2f}" for skill in (*played["new"].values(), *played["old"].values()))
    return "\n".join([*rows, line("chance", *chances)])


def _loop(figures: Mapping[str, Any]) -> str:
    if not figures.get("loop"):
        return _NOT_YET
    headings = (
        "gains",
        "run",
        "checkpoints",
        "new task",
        "old skills",
        "area under the front",
        "closed loop minus it",
    )
    rows = head(*headings)
    rows += [
        line(
            _LOOPS[kind],
            row["method"],
            str(row["checkpoints"]),
            _estimate(row["new"]),
            _estimate(row["old"]),
            _estimate(row["area"]),
            _estimate(row["gain"], signed=True),
        )
        for kind, row in figures["loop"].items()
    ]
    return "\n".join(rows)


def _response(figures: Mapping[str, Any]) -> str:
    """The plot, which lies beside the page, and a row per arm: mean over seeds, smallest to largest."""
    told = figures.get("response")
    if not told:
        return _NOT_YET
    rows = head("gains", *_RESPONSE.values())
    for arm, seeds in told["arms"].items():
        cells = []
        for name in _RESPONSE:
            values = [seen[name] for seen in seeds.values()]
            cells.append(_estimate({"value": fmean(values), "low": min(values), "high": max(values)}, signed=True))
        rows.append(line(arm, *cells))
    below = (
        f"The loop of {told['method']}; training seeds: {len(seeds)}, in brackets the smallest and the largest. "
        "The plot shows the seed that was played last."
    )
    return "\n".join(["![answer to a step](forgetting_step.png)", "", *rows, "", below])


def _step_costs(figures: Mapping[str, Any]) -> str:
    costs = figures.get("costs")
    if not costs:
        return _NOT_YET
    rows = head("a training step", f"{costs['clock']} time, ms", "times the one before", "by wall time")
    every, usual = costs["every"], ThermostatConfig().every
    rows += [
        line("LoRA", f"{costs['baseline_ms']:.1f}", "", ""),
        line(
            "with HSW",
            f"{costs['method_ms']:.1f}",
            _estimate(costs["hsw_step_ratio"], digits=3),
            _estimate(costs["hsw_step_ratio_wall"], digits=3),
        ),
        *(
            line(
                f"with the Thermostat too, a reading every {steps} steps{by_default}",
                f"{costs['method_ms'] + costs['reading_ms'] / steps:.1f}",
                _estimate(_spread(costs["thermostat_step_ratio"], every / steps), digits=3),
                _estimate(_spread(costs["thermostat_step_ratio_wall"], every / steps), digits=3),
            )
            for steps, by_default in {every: "", usual: ", the default"}.items()
        ),
    ]
    below = f"Medians of {costs['rounds']} rounds, 95 % bootstrap intervals over rounds."
    return "\n".join([*rows, "", below])


def _spread(ratio: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A step's ratio with that share of the readings."""
    return {name: None if value is None else 1 + share * (value - 1) for name, value in ratio.items()}


def _played_cells(played: Mapping[str, Any]) -> list[str]:
    rates = (played["new"], played["old"], *played["families"].values(), played["questions"])
    return [*map(_estimate, rates), _estimate(played["kl"], digits=3), _estimate(played["drift"], digits=3)]


def _equal_cells(method: Mapping[str, Any]) -> list[str]:
    equal = method["equal_success"]
    if equal is None:
        return [""] * 4
    forgets = (_estimate(equal[kind], signed=True) for kind in ("forgets", "baseline_forgets"))
    return [_estimate(equal["new"]), *forgets, _estimate(equal["ratio"], signed=True) or "none"]


def _estimate(estimate: Mapping[str, Any] | None, digits: int = 2, signed: bool = False) -> str:
    """E.g. 0.51 (0.43-0.60), or -0.03 (-0.08 to 0.02); empty where there is none."""
    if estimate is None or estimate["value"] is None:
        return ""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if low is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f}{' to ' if signed else '-'}{high:.{digits}f})"


def _range(numbers: Iterable[int]) -> str:
    some = list(numbers)
    return str(some[0]) if min(some) == max(some) else f"{min(some)} to {max(some)}"


def _over(figures: Mapping[str, Any]) -> str:
    if len(figures["seeds"]) == 1:
        return "One training seed, so without intervals"
    return f"95 % bootstrap intervals over {len(figures['seeds'])} training seeds"


FORGETTING: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "bases": _bases,
    "methods": _methods,
    "fronts": _fronts,
    "sequence": _sequence,
    "loop": _loop,
    "response": _response,
    "step_costs": _step_costs,
}
_USES = {
    "artifact": "teacher's pass over the probe",
    "probe": "probe at training",
    "loss": "extra loss",
    "replay": "replay",
}
_MEASURES = {
    "bwt": "BWT",
    "forgetting": "forgetting",
    "fwt": "FWT",
    "libero_fwt": "LIBERO FWT",
    "libero_nbt": "LIBERO NBT",
    "libero_auc": "LIBERO AUC",
}
_RESPONSE = {
    "before_d": "d before",
    "conflict_d": "d under conflict",
    "peak_d": "largest d",
    "after_d": "d after",
    "conflict_loss": "loss on the conflicting data",
    "new_loss": "loss on the new task, at last",
    "strength": "mean strength",
}
_LOOPS = {
    "closed": "from readings (closed loop)",
    "shuffled": "the same trace, time-shuffled",
    "mean": "the trace's mean",
    "constant": "best constant",
}
