"""Comparisons with known fronts: a method is given by its points' success rates, which are met exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluators.tradeoffs import Comparison, Entry, Played, Point, Skill

NEW = {"ground_yellow": Skill("ground", 1 / 3)}
OLD = {
    "ground_red": Skill("ground", 1 / 3),
    "ground_blue": Skill("ground", 1 / 3),
    "recall": Skill("recall", 1 / 3),
    "place": Skill("place", 0.0),
}
#: Method -> (new, old) of its points, the last one final.
Rates = Mapping[str, Sequence[tuple[float, float]]]
RATES: Rates = {
    "lora": [(0.5, 0.6), (0.8, 0.3)],
    "ours": [(0.5, 0.85), (0.8, 0.75)],
    "shuffled": [(0.5, 0.7), (0.8, 0.5)],
    "wise_ft": [(0.4, 0.8), (0.7, 0.45)],
    "replay": [(0.6, 0.85), (0.8, 0.85)],
}
ENTRIES = {
    "lora": ("baseline", ()),
    "ours": ("ours", ("artifact", "probe")),
    "shuffled": ("control", ("artifact", "probe")),
    "wise_ft": ("rival", ()),
    "replay": ("rival", ("replay",)),
}


def exactly(rate: float, layouts: range) -> dict[int, bool]:
    """A success wherever the sum of the rates so far passes a whole number."""
    return {i: int((i + 1) * rate + 1e-9) > int(i * rate + 1e-9) for i in layouts}


def policy(new: float, old: float, layouts: range, questions: int = 30, kl: float = 0.1) -> Played:
    """The same rate on all old tasks."""
    return Played(
        {task: exactly(new, layouts) for task in NEW},
        {task: exactly(old, layouts) for task in OLD},
        {"colour": (questions, 40), "side": (10, 20)},
        kl,
        kl / 2,
    )


def comparison(
    rates: Rates = RATES,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    base: tuple[float, float] = (0.2, 0.9),
    layouts: int = 20,
    loop: Mapping[str, str] | None = None,
    spread: float = 0.05,
    apart: int = 1000,
) -> Comparison:
    """Final points are played on twice as many layouts.

    Args:
        spread: what a seed adds to all rates from one seed to the next, 0 for seed 2; ours retains less by it.
        apart: between the seeds' first layouts; 0 for the same layouts.
    """

    def play(name: str, point: tuple[float, float], final: bool) -> dict[int, Played]:
        count, sign = layouts * (2 if final else 1), -1 if name == "ours" else 1
        return {
            s: policy(
                point[0] + spread * (s - 2),
                point[1] + sign * spread * (s - 2),
                range(apart * s, apart * s + count),
            )
            for s in seeds
        }

    points = {
        Point(name, "only", 100 * (place + 1)): play(name, point, place == len(of_method) - 1)
        for name, of_method in rates.items()
        for place, point in enumerate(of_method)
    }
    finals = {name: Point(name, "only", 100 * len(of_method)) for name, of_method in rates.items()}
    methods = {name: Entry(ENTRIES[name][0], finals[name], ENTRIES[name][1]) for name in rates}
    loop = {"closed": "ours", "shuffled": "shuffled"} if loop is None else loop
    return Comparison(NEW, OLD, methods, play("base", base, True), points, "ours", loop, question_chance=0.4)
