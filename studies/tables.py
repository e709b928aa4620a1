"""Tables in Markdown: their parts, the table of targets, and every table of a study, from its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from evaluators.console import markdown_table
from ipvla.forgetting.thermostat import ThermostatConfig

Figures = Mapping[str, Any]
_NOT_YET: Final = "Not measured yet."


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *below: str, rule: str = "---") -> str:
    """Headings, rows, and paragraphs below them; `rule` is that of all columns but the first."""
    return "\n\n".join([markdown_table(headings, rows, rule), *filter(None, below)])


def estimate(one: Figures | None, digits: int = 2, signed: bool = False) -> str:
    """E.g. 0.51 (0.43-0.60), or -0.03 (-0.08 to 0.02); empty where there is none."""
    if one is None or one["value"] is None:
        return ""
    value, low, high = (one[name] for name in ("value", "low", "high"))
    if low is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f}{' to ' if signed else '-'}{high:.{digits}f})"


def ratio(one: Figures) -> str:
    """E.g. 1.008 (1.002 to 1.018)."""
    return estimate(one, 3, signed=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest, as an estimate."""
    return {"value": fmean(values), "low": min(values), "high": max(values)}


def rate(row: Figures) -> str:
    """Of a row of successes."""
    low, high = row["wilson95"]
    return estimate({"value": row["rate"], "low": low, "high": high})


def counted(row: Figures) -> str:
    """The same with its counts."""
    return f"{row['k']}/{row['n']} = {rate(row)}"


def extent(numbers: Iterable[int]) -> str:
    """E.g. 60, or 20 to 80."""
    some = list(numbers)
    return str(min(some)) if min(some) == max(some) else f"{min(some)} to {max(some)}"


def where(run: Mapping[str, Any]) -> str:
    """A sentence on the run that gave some figures; `commit` is a list where it is not known which one it was."""
    commits = [run["commit"]] if isinstance(run["commit"], str) else run["commit"]
    named = " or ".join(f"`{one[:10]}`" for one in commits)
    return f"Commit {named}, {run['machine']['cpu']}, {run['machine']['os']}."


def target_table(targets: Sequence[Figures], *below: str) -> str:
    """Of targets as `Target.to_dict` gives them; notes below it."""

    def value(one: Figures) -> str:
        bare = {"low": None, "high": None}
        return "none" if one["value"] is None else ratio({**bare, **one})

    def side(one: Figures) -> str:
        return (">" if one["at_least"] else "<") + ("" if one.get("beyond") else "=")

    rows = [
        (one["name"], value(one), f"{side(one)} {one['bound']:.3f}", "yes" if one["met"] else "**no**")
        for one in targets
    ]
    notes = " ".join(f"`{one['name']}`: {one['note']}." for one in targets if one.get("note"))
    return table(("target", "value", "bound", "met"), rows, notes, *below)


def targets_of(record: Figures) -> str:
    """A record's targets, and where it ran."""
    if any("run" in part for part in record["figures"].values() if isinstance(part, Mapping)):
        return target_table(record["targets"], "Commit and machine of each part stand below its table.")
    seeds, commits = record["seeds"], {run["commit"]: None for run in record.get("runs", [])}
    place = where(record).removesuffix(".")
    if seeds:
        place += f", seeds {seeds[0] if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]} ({len(seeds)})'}"
    earlier = ", ".join(f"`{one[:10]}`" for one in commits if one != record["commit"])
    also = f" Earlier runs, which count too, at {earlier}." if earlier else ""
    return target_table(record["targets"], f"{place}.{also}")


def _success(figures: Figures) -> str:
    policies = figures["success"]
    rows = [
        (family, *(counted(of[family]) for of in policies.values()), f"{row['chance']:.2f}")
        for family, row in next(iter(policies.values())).items()
    ]
    return table(("family", *policies, "chance"), rows)


def _repeats(figures: Figures) -> str:
    """The same policies from other training seeds and in other number formats."""
    first = figures["repeats"][0]["success"]
    families = list(next(iter(first.values())))
    rows = [
        (
            str(run["seed"]),
            run["precision"],
            policy,
            *(f"{of[family]['k']}/{of[family]['n']}" for family in families),
        )
        for run in figures["repeats"]
        for policy, of in run["success"].items()
    ]
    return table(("training seed", "format", "memory", *families), rows)


def _learned(figures: Figures) -> str:
    """Success of trained policies on LIBERO's published initial states, by suite, task and training seed."""
    suites = {name: figures[name] for name in ("object", "spatial") if name in figures}
    policies = [name for suite in suites.values() for name in suite["success"]]
    rows = [
        (f"`libero_{suite}`", task.replace("_", " "), *(counted(of[task]) for of in played["success"].values()))
        for suite, played in suites.items()
        for task in next(iter(played["success"].values()))
    ]
    rows += [(f"`libero_{suite}`", "**all seeds**", counted(_whole(of["all"]))) for suite, of in suites.items()]
    columns = dict.fromkeys(policies)
    return table(("suite", "task", *columns), [row + ("",) * (2 + len(columns) - len(row)) for row in rows])


def _played(figures: Figures) -> str:
    """The few figures that a reader needs first: what was learned of LIBERO, and how long all of it took."""
    rows = [
        (f"`libero_{suite}`", counted(_whole(of["all"])), str(len(of["seeds"])), f"{of['minutes']:.0f}")
        for suite, of in figures.items()
        if suite in ("object", "spatial")
    ]
    headings = ("suite", "published initial states", "training seeds", "minutes in all, two CPU cores")
    return table(headings, rows)


def _pro(figures: Figures) -> str:
    """Success in LIBERO-PRO's suites of a policy that was trained on libero_object."""
    rows = [(f"`{suite}`", counted(_whole(of))) for suite, of in figures["pro"]["suites"].items()]
    return table(("suite", "success"), rows)


def _plus(figures: Figures) -> str:
    """Success under LIBERO-Plus' perturbations, and the difference to the same states without any."""
    rows = []
    for row in figures["plus"]["rows"]:
        low, high = row["difference95"] or (None, None)
        difference = {"value": row["difference"], "low": low, "high": high}
        level = "all" if row["level"] is None else str(row["level"])
        rows.append((row["dimension"], level, counted(row), estimate(difference, signed=True)))
    return table(("dimension", "level", "success", "minus unperturbed"), rows)


def _whole(one: Figures) -> Figures:
    return {"rate": one["k"] / one["n"], **one}


def _figures(figures: Figures) -> str:
    rows = [(name, *(str(one[of]) for of in ("mean", "min", "max"))) for name, one in figures.items()]
    return table(("figure", "mean", "least", "largest"), rows)


def _expert(figures: Figures) -> str:

    def row(suite: str, task: str, one: Figures, steps: object) -> tuple[str, ...]:
        low, high = one["wilson95"]
        return f"`{suite}`", task, f"{one['k']}/{one['n']}", f"{low:.2f}-{high:.2f}", str(steps)

    rows = []
    for suite, of in figures.items():
        for task, one in of["tasks"].items():
            rows.append(row(suite, task.replace("_", " "), one, "" if one["steps"] is None else one["steps"]))
        rows.append(row(suite, "**all**", of["all"], ""))
    return table(("suite", "task", "success", "Wilson 95 %", "control steps, median"), rows)


def _rates(rates: Mapping[str, Mapping[str, Any]], heading: str, compared: str = "mechanism") -> str:
    first = next(iter(rates.values()))
    rows = [(name, *map(rate, row.values())) for name, row in rates.items()]
    rows.append(("chance", *(f"{cell['chance']:.2f}" for cell in first.values())))
    n = extent(cell["n"] for row in rates.values() for cell in row.values())
    seeds = len(next(iter(first.values()))["seeds"])
    over = f"{seeds} training seeds" if seeds > 1 else "one training seed"
    below = f"Wilson 95 % intervals; n = {n} episodes per cell, over {over}."
    return table((compared, *map(heading.format, first)), rows, below)


def _late(figures: Figures) -> str:
    """Success by family, way of taking answers and latency."""
    success = figures["success"]
    latencies = list(next(iter(success.values())))
    families = list(next(iter(next(iter(success.values())).values())))
    rows = [
        (family, way, *(rate(of[latency][family]) if latency in of else "" for latency in latencies))
        for family in families
        for way, of in success.items()
    ]
    first = next(iter(next(iter(success.values())).values()))
    n, seeds = extent(row["n"] for row in first.values()), len(next(iter(first.values()))["seeds"])
    below = f"Wilson 95 % intervals; n = {n} episodes per cell; training seeds: {seeds}."
    return table(("family", "way", *(f"latency {latency}" for latency in latencies)), rows, below)


def _costs(figures: Figures) -> str:
    columns = {
        "parameters": "parameters",
        "memory_parameters": "of them memory",
        "state_bytes": "state, bytes per episode",
        "act_ms_batch1": "act, batch 1, ms",
        "act_ms_batch8": "act, batch 8, ms",
        "batch8_speedup": "batch 8 against 8 acts",
        "growth": "step 1000 / step 10",
        "frames_per_s": "training frames/s",
    }
    formats = ("{:,}", "{:,}", "{:,}", "{:.1f}", "{:.1f}", "{:.1f} x", "{:.2f}", "{:.0f}")
    rows = [
        (name, *(shape.format(cost[column]) for column, shape in zip(columns, formats, strict=True)))
        for name, cost in figures["costs"].items()
    ]
    return table(("mechanism", *columns.values()), rows, rule="--:")


def _head_costs(figures: Figures) -> str:
    rows = [
        (
            head,
            *(f"{cost['parameters']:,}", str(cost["evaluations"])),
            *(f"{cost[f'act_ms_batch{batch}']:.1f}" for batch in (1, 8)),
        )
        for head, cost in figures["costs"].items()
    ]
    return table(("head", "parameters", "evaluations", "act, batch 1, ms", "act, batch 8, ms"), rows, rule="--:")


def _head_use(figures: Figures) -> str:
    """Recall with the memory intact, reset and swapped, over all seeds."""
    rows = []
    for head, memories in figures["use"].items():
        for memory, kinds in memories.items():
            sums = {kind: Counter[str]() for kind in kinds}
            for kind, seeds in kinds.items():
                for counts in seeds.values():
                    sums[kind].update(counts)
            first = next(iter(sums.values()))
            n = sum(first[name] for name in ("both", "only_undisturbed", "only_changed", "neither"))
            changed = [f"{of['both'] + of['only_changed']}/{n}" for of in sums.values()]
            rows.append((head, memory, f"{first['both'] + first['only_undisturbed']}/{n}", *changed))
    kinds = next(iter(next(iter(figures["use"].values())).values()))
    return table(("head", "memory", "intact", *kinds), rows)


def _errors(figures: Figures) -> str:
    """RMS distance to the exact solution on trained fields, by integrator and evaluations."""
    errors = figures["errors"]
    columns = list(dict.fromkeys(n for of in errors.values() for one in of.values() for n in one))
    rows = [
        (head, name, *(f"{one[n]:.4f}" if n in one else "" for n in columns))
        for head, of in errors.items()
        for name, one in of.items()
    ]
    return table(("head", "integrator", *(f"{n} evaluations" for n in columns)), rows, rule="--:")


def _plan(figures: Figures) -> str:
    plan = figures["plan"]
    families = list(next(iter(plan["ways"].values()))["success"])
    headings = ("reasoning", "tokens per control step", "wall ms per control step", "CPU ms per control step")
    rows = [
        (
            name,
            *(f"{way[f'{of}_per_step']:.2f}" for of in ("tokens", "wall_ms", "cpu_ms")),
            *(counted(way["success"][family]) for family in families),
        )
        for name, way in plan["ways"].items()
    ]
    paired = plan["paired"]
    verdict = "a significant loss" if plan["once_loses_significantly"] else "no significant loss"
    tested = (
        f"Once takes {plan['wall_speedup']:.1f} times less wall time and {plan['cpu_speedup']:.1f} times less CPU "
        f"time. Of {paired['pairs']} layouts, {paired['only_once']} succeeded only with reasoning once and "
        f"{paired['only_every_step']} only with reasoning at every step: {verdict} (exact McNemar, "
        f"p = {paired['p_value']:.2g})."
    )
    return table((*headings, *families), rows, tested)


def _use(figures: Figures) -> str:
    rows: dict[str, dict[int, str]] = {}
    for row in figures["tasks"]:
        low, high = row["lost95"]
        lost = f"lost {row['lost']:.2f} ({low:.2f} to {high:.2f})"
        rows.setdefault(row["probe"], {})[row["t"]] = f"{row['undisturbed']} -> {row['k']} of {row['n']}, {lost}"
    times = list(next(iter(rows.values())))
    cells = [(name, *(of[t] for t in times)) for name, of in rows.items()]
    return table(("memory", *(f"from step {t}" for t in times)), cells)


def _bases(figures: Figures) -> str:
    played = figures["played"]
    skills = {**played["new"], **played["old"]}
    rows = []
    for seed, policy in played["base"].items():
        cells = f"{policy['new']} {policy['old']}".split()  # in the order of the tasks
        rows.append((seed, *(cell.partition(":")[0] for cell in cells)))
    rows.append(("chance", *(f"{skill['chance']:.2f}" for skill in skills.values())))
    return table(("training seed", *skills), rows)


def _methods(figures: Figures) -> str:
    base, methods = figures["base"], figures["methods"]

    def cells(played: Figures) -> tuple[str, ...]:
        rates = (played["new"], played["old"], *played["families"].values(), played["questions"])
        return (*map(estimate, rates), estimate(played["kl"], 3), estimate(played["drift"], 3))

    rows = [("before fine-tuning", "", *cells(base))]
    for name, method in methods.items():
        rows.append((name, ", ".join(_USES[use] for use in method["uses"]), *cells(method["final"])))
    played = [base["episodes"], *(method["final"]["episodes"] for method in methods.values())]
    new, old = (extent(episodes[part] for episodes in played) for part in ("new", "old"))
    below = f"{new} episodes of the new task and {old} of the old skills per row. {_over(figures)}. "
    if figures["question_chance"] is not None:
        below += f"Giving every question's most frequent answer: {figures['question_chance']:.2f}. "
    below += "KL: of the teacher's and the student's actions on the probe, nats."
    headings = ("method", "takes", "new task", "old skills", *base["families"], "questions", "KL", "drift d")
    return table(headings, rows, below)


def _fronts(figures: Figures) -> str:
    methods, ours, baseline = figures["methods"], figures["ours"], figures["baseline"]
    headings = (
        *("method", "points", "area under the front", f"{ours} minus it"),
        *(f"equal new-task success with {baseline}", "forgets there", f"{baseline} forgets there", "ratio"),
    )
    rows = []
    for name, method in sorted(methods.items(), key=lambda item: -float(item[1]["area"]["value"])):
        gap = "" if name == ours else estimate(methods[ours]["gaps"][name], signed=True)
        equal, cells = method["equal_success"], [""] * 4
        if equal is not None:
            forgets = (estimate(equal[kind], signed=True) for kind in ("forgets", "baseline_forgets"))
            cells = [estimate(equal["new"]), *forgets, estimate(equal["ratio"], signed=True) or "none"]
        rows.append((name, str(len(method["points"])), estimate(method["area"]), gap, *cells))
    below = f"No ratio stands where {baseline} forgets too little to divide by. {_over(figures)}."
    return f"![new task against old skills](forgetting.png)\n\n{table(headings, rows, below)}"


def _summary(figures: Figures) -> str:
    """The few rows that a reader needs first."""
    base, methods = figures["base"], figures["methods"]
    against = methods[figures["ours"]]["equal_success"]
    rows = [("before fine-tuning", estimate(base["new"]), estimate(base["old"]), "")]
    for name in (one for one in _SUMMARISED if one in methods):
        final, equal = methods[name]["final"], methods[name]["equal_success"]
        forgotten = estimate(equal["forgets"], signed=True) if equal else ""
        if name == figures["baseline"] and against:
            forgotten = estimate(against["baseline_forgets"], signed=True)
        rows.append((f"`{name}`", estimate(final["new"]), estimate(final["old"]), forgotten))
    headings = ("method", "new task", "old skills", "old skills lost, at equal new-task success")
    return table(headings, rows, f"{_over(figures)}.")


def _choice(figures: Figures) -> str:
    choice = figures["choice"]
    tried = Counter(point["method"] for point in figures["tried"])
    rows = []
    for name, area in sorted(choice["areas"].items(), key=lambda item: -float(item[1])):
        points = [f"{point['strength']} at {point['checkpoint']}" for point in choice["points"][name]]
        rows.append((name, str(tried[name]), f"{area:.2f}", points[0], ", ".join(points[1:])))
    return table(("method", "points played", "area under the front", "final point", "second point"), rows)


def _sequence(figures: Figures) -> str:
    sequence = figures["sequence"]
    methods, tasks = sequence["methods"], list(sequence["tasks"])
    shown = [name for name in _MEASURES if any(name in method["measures"] for method in methods.values())]
    rows = [
        (name, *(estimate(method["measures"].get(measure), signed=True) for measure in shown))
        for name, method in methods.items()
    ]
    below = (
        f"Tasks in this order: {', '.join(tasks)}; training seeds: "
        f"{extent(len(method['seeds']) for method in methods.values())}. LIBERO's measures from one evaluation "
        "per task, at the end of its training. R, mean over seeds:"
    )
    scores = []
    for name, method in methods.items():
        for task, row in enumerate(zip(*(run["scores"] for run in method["seeds"].values()), strict=True)):
            cells = (f"{fmean(of):.2f}" if None not in of else "" for of in zip(*row, strict=True))
            scores.append((name, tasks[task], *cells))
    headings = ("method", *(_MEASURES[name] for name in shown))
    return table(headings, rows, below, table(("method", "after", *tasks), scores))


def _loop(figures: Figures) -> str:
    headings = ("gains", "run", "checkpoints", "new task", "old skills", "area under the front")
    rows = [
        (
            *(_LOOPS[kind], row["method"], str(row["checkpoints"])),
            *(estimate(row[of]) for of in ("new", "old", "area")),
            estimate(row["gain"], signed=True),
        )
        for kind, row in figures["loop"].items()
    ]
    return table((*headings, "closed loop minus it"), rows)


def _response(figures: Figures) -> str:
    response = figures["response"]
    rows = [
        (arm, *(estimate(spread([seen[name] for seen in seeds.values()]), signed=True) for name in _RESPONSE))
        for arm, seeds in response["arms"].items()
    ]
    seeds = len(next(iter(response["arms"].values())))
    below = (
        f"The loop of {response['method']}; training seeds: {seeds}, in brackets the smallest and the largest. "
        "The plot shows the seed that was played last."
    )
    return f"![answer to a step](forgetting_step.png)\n\n{table(('gains', *_RESPONSE.values()), rows, below)}"


def _step_costs(figures: Figures) -> str:
    costs = figures["costs"]
    every, usual = costs["every"], ThermostatConfig().every

    def ratios(name: str, share: float) -> tuple[str, ...]:
        """By either clock, of a step with that share of the readings."""
        both = (costs[f"{name}_step_ratio{clock}"] for clock in ("", "_wall"))
        return tuple(
            estimate({of: None if value is None else 1 + share * (value - 1) for of, value in one.items()}, 3)
            for one in both
        )

    rows = [
        ("LoRA", f"{costs['baseline_ms']:.1f}", "", ""),
        ("with HSW", f"{costs['method_ms']:.1f}", *ratios("hsw", 1)),
    ]
    for steps, by_default in {every: "", usual: ", the default"}.items():
        title = f"with the Thermostat too, a reading every {steps} steps{by_default}"
        ms = costs["method_ms"] + costs["reading_ms"] / steps
        rows.append((title, f"{ms:.1f}", *ratios("thermostat", every / steps)))
    headings = ("a training step", f"{costs['clock']} time, ms", "times the one before", "by wall time")
    return table(headings, rows, f"Medians of {costs['rounds']} rounds, 95 % bootstrap intervals over rounds.")


def _over(figures: Figures) -> str:
    if len(figures["seeds"]) == 1:
        return "One training seed, so without intervals"
    return f"95 % bootstrap intervals over {len(figures['seeds'])} training seeds"


#: Kind of a table -> the figure that it needs, if it may be missing, and how it is made.
_KINDS: Mapping[str, tuple[str | None, Callable[[Figures], str]]] = {
    "success": (None, _success),
    "repeats": ("repeats", _repeats),
    "learned": ("object", _learned),
    "played": ("object", _played),
    "pro": ("pro", _pro),
    "plus": ("plus", _plus),
    "libero_sequence": ("forgetting", lambda figures: _sequence({"sequence": figures["forgetting"]})),
    "figures": (None, _figures),
    "expert": (None, _expert),
    "choice": (None, _choice),
    "use": (None, _use),
    "families": ("success", lambda figures: _rates(figures["success"], "{}")),
    "delays": ("delays", lambda figures: _rates(figures["delays"], "delay {}")),
    "plan": ("plan", _plan),
    "costs": ("costs", _costs),
    "heads": ("success", lambda figures: _rates(figures["success"], "{}", "head")),
    "samplings": ("samplings", lambda figures: _rates(figures["samplings"], "{}", "sampling")),
    "head_use": ("use", _head_use),
    "head_costs": ("costs", _head_costs),
    "errors": ("errors", _errors),
    "late": ("success", _late),
    "bases": ("played", _bases),
    "methods": ("methods", _methods),
    "fronts": ("methods", _fronts),
    "summary": ("methods", _summary),
    "sequence": ("sequence", _sequence),
    "loop": ("loop", _loop),
    "response": ("response", _response),
    "step_costs": ("costs", _step_costs),
}
MEMORY: Final = ("families", "delays", "plan", "costs")
HEADS: Final = ("heads", "samplings", "head_use", "head_costs", "errors")
SPEEDS: Final = ("late",)
FORGETTING: Final = ("bases", "methods", "fronts", "sequence", "loop", "response", "step_costs")
KINDS: Final = frozenset(_KINDS)


def study_table(figures: Figures, kind: str) -> str:
    """One table. KeyError for a kind that is unknown."""
    needed, make = _KINDS[kind]
    return make(figures) if needed is None or figures.get(needed) else _NOT_YET


def measured(figures: Figures, kinds: Iterable[str]) -> list[str]:
    """Those tables that the figures are there for."""
    return [study_table(figures, kind) for kind in kinds if figures.get(_KINDS[kind][0] or "")]


_USES = {
    "artifact": "teacher's pass over the probe",
    "probe": "probe at training",
    "loss": "extra loss",
    "replay": "replay",
}
_SUMMARISED: Final = ("lora", "hsw", "gpm", "input_decay")
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
