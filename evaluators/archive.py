"""A comparison of trade-offs as compact JSON, outcomes as strings of 0 and 1, and back.

Paired intervals need every layout's outcome, so records hold them; a policy takes a few hundred bytes. Outcomes
stand in the order of the tasks, and within a task in the order of `layouts`, which names for each seed all that
any policy was played on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from evaluators.tradeoffs import Comparison, Entry, Played, Point, Skill


def encode(there: Comparison) -> dict[str, Any]:
    """JSON values, which `decode` reads."""
    layouts: dict[int, dict[str, list[int]]] = {}
    for seed in there.seeds:
        policies = [there.base[seed], *(played[seed] for played in there.points.values())]
        outcomes = [{**policy.new, **policy.old} for policy in policies]
        layouts[seed] = {
            task: sorted({layout for played in outcomes for layout in played[task]})
            for task in (*there.new, *there.old)
        }

    def policy(played: Played, tasks: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        return {
            "new": " ".join(_bits(played.new[task], tasks[task]) for task in there.new),
            "old": " ".join(_bits(played.old[task], tasks[task]) for task in there.old),
            "questions": " ".join(f"{kind}:{k}/{n}" for kind, (k, n) in played.questions.items()),
            "kl": played.kl,
            "drift": played.drift,
        }

    def by_seed(policies: Mapping[int, Played]) -> dict[str, Any]:
        return {str(seed): policy(policies[seed], layouts[seed]) for seed in there.seeds}

    return {
        **{part: {name: asdict(one) for name, one in getattr(there, part).items()} for part in _NAMED},
        "ours": there.ours,
        "loop": dict(there.loop),
        "question_chance": there.question_chance,
        "layouts": {str(seed): {task: _runs(of) for task, of in tasks.items()} for seed, tasks in layouts.items()},
        "base": by_seed(there.base),
        "points": [{**asdict(point), "seeds": by_seed(played)} for point, played in there.points.items()],
    }


_NAMED: Final = ("new", "old", "methods")


def decode(values: Mapping[str, Any]) -> Comparison:
    """What `encode` was given. ValueError if outcomes do not agree with their counts or layouts."""
    layouts = {seed: {task: _numbers(runs) for task, runs in of.items()} for seed, of in values["layouts"].items()}

    def policy(told: Mapping[str, Any], tasks: Mapping[str, Sequence[int]]) -> Played:
        new, old = (
            {
                task: _outcomes(bits, tasks[task])
                for task, bits in zip(values[part], told[part].split(), strict=True)
            }
            for part in ("new", "old")
        )
        questions = {}
        for row in told["questions"].split():
            kind, k, n = row.replace("/", ":").split(":")
            questions[kind] = (int(k), int(n))
        return Played(new, old, questions, told["kl"], told["drift"])

    def by_seed(policies: Mapping[str, Any]) -> dict[int, Played]:
        return {int(seed): policy(told, layouts[seed]) for seed, told in policies.items()}

    return Comparison(
        new={name: Skill(**skill) for name, skill in values["new"].items()},
        old={name: Skill(**skill) for name, skill in values["old"].items()},
        methods={
            name: Entry(entry["role"], Point(**entry["final"]), tuple(entry["uses"]))
            for name, entry in values["methods"].items()
        },
        base=by_seed(values["base"]),
        points={Point(p["method"], p["strength"], p["checkpoint"]): by_seed(p["seeds"]) for p in values["points"]},
        **{name: values[name] for name in ("ours", "loop", "question_chance")},
    )


def _bits(outcomes: Mapping[int, bool], layouts: Sequence[int]) -> str:
    """E.g. 2/3:110, successes of episodes and one place for each layout, - where it was not played."""
    bits = "".join("01"[bool(outcomes[i])] if i in outcomes else "-" for i in layouts).rstrip("-")
    return f"{bits.count('1')}/{len(outcomes)}:{bits}"


def _outcomes(text: str, layouts: Sequence[int]) -> dict[int, bool]:
    bits = text.partition(":")[2]
    outcomes = {layout: bit == "1" for layout, bit in zip(layouts, bits, strict=False) if bit != "-"}
    if _bits(outcomes, layouts) != text:
        raise ValueError(f"{text!r} does not fit {len(layouts)} layouts; take the record as it was written")
    return outcomes


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as e.g. 1000-1059 2000-2000."""
    starts = [n for before, n in zip([None, *numbers], numbers, strict=False) if before != n - 1]
    ends = [n for n, after in zip(numbers, [*numbers[1:], None], strict=True) if after != n + 1]
    return " ".join(f"{first}-{last}" for first, last in zip(starts, ends, strict=True))


def _numbers(runs: str) -> list[int]:
    bounds = [[int(bound) for bound in run.split("-")] for run in runs.split()]
    return [number for first, last in bounds for number in range(first, last + 1)]
