"""What the forgetting benchmark reports, given what tuning chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.forgetting_choice import Choice
from benchmarks.forgetting_outcomes import Comparison, Entry, Played, Point
from benchmarks.forgetting_study import ForgettingStudy, methods, replay_of


@dataclass(frozen=True)
class Plan:
    """The points to play and who is compared with whom.

    Attributes:
        points: those of closed loops before those that replay them.
        entries: every method, in the tables' order.
        ours: of our methods the one with the largest area on the tuning seed.
        loop: of `forgetting_outcomes.LOOPS`, the method that is it; empty without a closed loop.
    """

    points: tuple[Point, ...]
    entries: Mapping[str, Entry]
    ours: str
    loop: Mapping[str, str]

    @classmethod
    def of(cls, study: ForgettingStudy, choice: Choice) -> Plan:
        """For the methods of the study. ValueError if none of them is ours."""
        trained = [name for name in study.names if not methods()[name].replays]
        ours = [name for name in trained if methods()[name].role == "ours"]
        if not ours:
            raise ValueError(f"methods is {list(study.names)}; name one of ours too")
        points = [point for name in trained for point in choice.points[name]]
        entries = {n: Entry(methods()[n].role, choice.final(n), methods()[n].uses) for n in trained}
        closed = [name for name in ours if methods()[name].constant]
        loop: dict[str, str] = {}
        if closed:
            best = choice.best(closed)
            final = choice.final(best)
            run = [point for point in choice.points[best] if point.strength == final.strength]
            for name in study.names:
                method = methods()[name]
                if method.replays:
                    points += [replay_of(point, name) for point in run]
                    entries[name] = Entry(method.role, replay_of(final, name), method.uses)
                    loop[method.replays] = name
            if loop:
                constant = methods()[best].constant
                loop = {"closed": best, **loop, **({"constant": constant} if constant in trained else {})}
        return cls(tuple(points), entries, choice.best(ours), loop)

    def comparison(
        self, study: ForgettingStudy, seed: int, base: Played, played: Mapping[Point, Played]
    ) -> Comparison:
        """What one seed came to."""
        asked = sum(n for _, n in base.questions.values())
        return Comparison(
            new=study.skills(new=True),
            old=study.skills(new=False),
            methods=self.entries,
            base={seed: base},
            points={point: {seed: policy} for point, policy in played.items()},
            ours=self.ours,
            loop=self.loop,
            question_chance=study.question_chance(seed) if asked else None,
        )
