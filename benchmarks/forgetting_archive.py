"""A comparison of the forgetting benchmark as compact JSON, outcomes as strings of 0 and 1, and back.

A policy takes a few hundred bytes. Outcomes stand in the order of the tasks, and within a task in the order of
`layouts`, which names for each seed all that any policy was played on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.forgetting_outcomes import Comparison, Entry, Played, Point, Skill


def encode(comparison: Comparison) -> dict[str, Any]:
    """JSON values, which `decode` reads."""
    layouts = {seed: _layouts(comparison, seed) for seed in comparison.seeds}

    def by_seed(policies: Mapping[int, Played]) -> dict[str, Any]:
        return {str(seed): _encode(policies[seed], comparison, layouts[seed]) for seed in comparison.seeds}

    return {
        "new": {name: asdict(skill) for name, skill in comparison.new.items()},
        "old": {name: asdict(skill) for name, skill in comparison.old.items()},
        "methods": {name: asdict(entry) for name, entry in comparison.methods.items()},
        "ours": comparison.ours,
        "loop": dict(comparison.loop),
        "question_chance": comparison.question_chance,
        "layouts": {str(seed): {task: _runs(of) for task, of in tasks.items()} for seed, tasks in layouts.items()},
        "base": by_seed(comparison.base),
        "points": [{**asdict(point), "seeds": by_seed(played)} for point, played in comparison.points.items()],
    }


def decode(values: Mapping[str, Any]) -> Comparison:
    """What `encode` was given. ValueError if outcomes do not agree with their counts or layouts."""
    layouts = {seed: {task: _numbers(runs) for task, runs in of.items()} for seed, of in values["layouts"].items()}

    def by_seed(policies: Mapping[str, Any]) -> dict[int, Played]:
        return {int(seed): _decode(policy, values, layouts[seed]) for seed, policy in policies.items()}

    return Comparison(
        new={name: Skill(**skill) for name, skill in values["new"].items()},
        old={name: Skill(**skill) for name, skill in values["old"].items()},
        methods={
            name: Entry(entry["role"], Point(**entry["final"]), tuple(entry["uses"]))
            for name, entry in values["methods"].items()
        },
        base=by_seed(values["base"]),
        points={Point(p["method"], p["strength"], p["checkpoint"]): by_seed(p["seeds"]) for p in values["points"]},
        ours=values["ours"],
        loop=values["loop"],
        question_chance=values["question_chance"],
    )


def _layouts(comparison: Comparison, seed: int) -> dict[str, list[int]]:
    """Task -> the layouts on which any of this seed's policies played it, ascending."""
    policies = [comparison.base[seed], *(played[seed] for played in comparison.points.values())]
    outcomes = [{**policy.new, **policy.old} for policy in policies]
    return {
        task: sorted({layout for played in outcomes for layout in played[task]})
        for task in (*comparison.new, *comparison.old)
    }


def _encode(played: Played, comparison: Comparison, layouts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    return {
        "new": " ".join(_bits(played.new[task], layouts[task]) for task in comparison.new),
        "old": " ".join(_bits(played.old[task], layouts[task]) for task in comparison.old),
        "questions": " ".join(f"{kind}:{k}/{n}" for kind, (k, n) in played.questions.items()),
        "kl": played.kl,
        "drift": played.drift,
    }


def _decode(policy: Mapping[str, Any], tasks: Mapping[str, Any], layouts: Mapping[str, Sequence[int]]) -> Played:
    new, old = (
        {
            task: _outcomes(bits, layouts[task])
            for task, bits in zip(tasks[part], policy[part].split(), strict=True)
        }
        for part in ("new", "old")
    )
    questions = {}
    for row in policy["questions"].split():
        kind, counts = row.split(":")
        k, n = counts.split("/")
        questions[kind] = (int(k), int(n))
    return Played(new, old, questions, policy["kl"], policy["drift"])


def _bits(outcomes: Mapping[int, bool], layouts: Sequence[int]) -> str:
    """E.g. 2/3:110, successes of episodes and one place for each layout, - where it was not played."""
    bits = "".join("01"[bool(outcomes[i])] if i in outcomes else "-" for i in layouts).rstrip("-")
    return f"{bits.count('1')}/{len(outcomes)}:{bits}"


def _outcomes(text: str, layouts: Sequence[int]) -> dict[int, bool]:
    bits = text.partition(":")[2]
    outcomes = {layout: bit == "1" for layout, bit in zip(layouts, bits, strict=False) if bit != "-"}
    if _bits(outcomes, layouts) != text:
        raise ValueError(f"{text!r} is not what {len(layouts)} layouts came to; take the record as it was written")
    return outcomes


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as e.g. 1000-1059 2000-2000."""
    starts = [n for before, n in zip([None, *numbers], numbers, strict=False) if before != n - 1]
    ends = [n for n, after in zip(numbers, [*numbers[1:], None], strict=True) if after != n + 1]
    return " ".join(f"{first}-{last}" for first, last in zip(starts, ends, strict=True))


def _numbers(runs: str) -> list[int]:
    bounds = [[int(bound) for bound in run.split("-")] for run in runs.split()]
    return [number for first, last in bounds for number in range(first, last + 1)]
