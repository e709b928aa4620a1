"""What the forgetting benchmark's policies did, layout by layout, and which methods and points they belong to.

Paired intervals need every layout's outcome, so that is what is kept, and what sessions are joined by.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, Self

from evaluators.grounding import GroundingRow
from ipvla.types import EpisodeResult

#: Task -> layout (an episode's `trial`) -> success.
Outcomes = Mapping[str, Mapping[int, bool]]

#: The one that forgetting is set in relation to, what is proposed, what a user would pick instead, and what shows
#: which part of ours does the work.
ROLES: Final = ("baseline", "ours", "rival", "control")
#: Beside the new task's demonstrations: what the teacher's one pass over the probe left, the probe at training, an
#: extra loss, demonstrations of the old skills.
USES: Final = ("artifact", "probe", "loss", "replay")
#: Gains: from readings, the same trace in another order, its mean at every step, the best constant.
LOOPS: Final = ("closed", "shuffled", "mean", "constant")


@dataclass(frozen=True)
class Skill:
    """One task that is played; `chance` in [0, 1], see `ipvla.sim.simulator.Task`."""

    family: str
    chance: float


@dataclass(frozen=True)
class Point:
    """One place on a method's trade-off.

    Attributes:
        method: its name in the tables.
        strength: name of the setting that the method is turned by, e.g. "gamma 0.5".
        checkpoint: updates of training, at least 1.
    """

    method: str
    strength: str
    checkpoint: int

    def __post_init__(self) -> None:
        if self.checkpoint < 1:
            raise ValueError(f"{self.method}: checkpoint is {self.checkpoint}; the base, at 0, is no point of it")

    def __str__(self) -> str:
        return f"{self.method}, strength {self.strength}, checkpoint {self.checkpoint}"


@dataclass(frozen=True)
class Entry:
    """A method in the comparison.

    Attributes:
        role: one of `ROLES`.
        final: the point that was chosen on the tuning seed.
        uses: of `USES`.
    """

    role: str
    final: Point
    uses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"{self.final.method}: role is {self.role!r}; choose one of {', '.join(ROLES)}")
        if unknown := [use for use in self.uses if use not in USES]:
            raise ValueError(f"{self.final.method}: uses {unknown}; choose of {', '.join(USES)}")

    @property
    def frugal(self) -> bool:
        """Neither replay nor an extra loss."""
        return not {"loss", "replay"} & set(self.uses)


@dataclass(frozen=True)
class Played:
    """What one policy did.

    Attributes:
        new, old: episodes of the new task and of the old skills.
        questions: kind -> (right, asked), see `evaluators.grounding`; every policy was asked the same.
        kl: mean KL(teacher || student) of the output on the probe, nats.
        drift: paired d on the probe, see `ipvla.forgetting.drift`.
    """

    new: Outcomes
    old: Outcomes
    questions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kl: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        for name in ("kl", "drift"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; pass None where it was not measured, or find out why")

    @classmethod
    def of(
        cls,
        results: Iterable[EpisodeResult],
        new: Collection[str],
        rows: Iterable[GroundingRow] = (),
        kl: float | None = None,
        drift: float | None = None,
    ) -> Self:
        """From episodes, those of the tasks `new` apart from the others, and from the answers' rows."""
        outcomes: tuple[dict[str, dict[int, bool]], dict[str, dict[int, bool]]] = ({}, {})
        for result in results:
            task = result.spec.task
            outcomes[task not in new].setdefault(task, {})[result.spec.trial] = result.success
        questions = {row.kind: (row.k, row.n) for row in rows if row.kind != "all"}
        return cls(*outcomes, questions, kl, drift)

    @property
    def accuracy(self) -> float | None:
        """Share of all questions that were answered right; None if none was asked."""
        asked = sum(n for _, n in self.questions.values())
        return sum(k for k, _ in self.questions.values()) / asked if asked else None


@dataclass(frozen=True)
class Comparison:
    """All that the figures are made from.

    Attributes:
        new, old: the tasks, by name.
        methods: by name, in the tables' order.
        base: training seed -> the pretrained policy that all of this seed's methods start from.
        points: point -> training seed -> the policy there.
        ours: which of our methods was chosen on the tuning seeds.
        loop: of `LOOPS`, the method that is it; "closed" and "shuffled" at least, or none at all.
        question_chance: share of questions that the most frequent answers would get right.

    Raises:
        ValueError: a name is unknown; a point was not played with every seed, or not on every task; policies of a
            seed were played on layouts of which none contain the others.
    """

    new: Mapping[str, Skill]
    old: Mapping[str, Skill]
    methods: Mapping[str, Entry]
    base: Mapping[int, Played]
    points: Mapping[Point, Mapping[int, Played]]
    ours: str
    loop: Mapping[str, str] = field(default_factory=dict)
    question_chance: float | None = None

    def __post_init__(self) -> None:
        self._check_names()
        for point, seeds in self.points.items():
            if set(seeds) != set(self.base):
                raise ValueError(
                    f"{point} was played with training seeds {sorted(seeds)}, the base with {sorted(self.base)}; "
                    "play every point with every seed"
                )
        for seed in self.seeds:
            policies = {"the base": self.base[seed]} | {str(p): played[seed] for p, played in self.points.items()}
            for part in ("new", "old"):
                for task in getattr(self, part):
                    _check_nested(task, {name: getattr(p, part).get(task, {}) for name, p in policies.items()})

    def _check_names(self) -> None:
        if not (self.new and self.old and self.base):
            raise ValueError(
                "a comparison needs a new task, an old skill, and the base of one training seed at least"
            )
        if set(self.new) & set(self.old):
            raise ValueError(f"tasks {sorted(set(self.new) & set(self.old))} are new and old; decide on one")
        if strangers := {point.method for point in self.points} - set(self.methods):
            raise ValueError(f"points of {sorted(strangers)}; say in `methods` what these are")
        for name, entry in self.methods.items():
            if entry.final.method != name or entry.final not in self.points:
                raise ValueError(f"the final point of {name} is {entry.final}; it must be one of its points")
        if self.ours not in self.methods or self.methods[self.ours].role != "ours":
            raise ValueError(f"ours is {self.ours!r}; name a method whose role is ours")
        baselines = [name for name, entry in self.methods.items() if entry.role == "baseline"]
        if len(baselines) != 1:
            raise ValueError(f"the baselines are {baselines}; give exactly one method this role")
        if self.loop and not {"closed", "shuffled"} <= set(self.loop) <= set(LOOPS):
            raise ValueError(f"loop has {sorted(self.loop)}; give closed and shuffled, of {', '.join(LOOPS)}")
        if unknown := [name for name in self.loop.values() if name not in self.methods]:
            raise ValueError(f"loop names {unknown}; name methods, of {', '.join(self.methods)}")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(self.base))

    @property
    def baseline(self) -> str:
        """The method whose role it is."""
        return next(name for name, entry in self.methods.items() if entry.role == "baseline")

    def points_of(self, method: str) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.method == method)

    def run_of(self, method: str) -> tuple[Point, ...]:
        """The points at the final point's strength: the checkpoints of one run."""
        strength = self.methods[method].final.strength
        return tuple(point for point in self.points_of(method) if point.strength == strength)

    def joined(self, later: Comparison) -> Comparison:
        """The seeds, points and methods of both; a policy that both have counts once, as `later` has it.

        Raises:
            ValueError: they differ in tasks, in what a method is, or in who is compared with whom.
        """
        for name in ("new", "old", "ours", "loop"):
            if getattr(self, name) != getattr(later, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} in one session and {getattr(later, name)} in the other; "
                    "only sessions of one recipe can be joined"
                )
        for name in set(self.methods) & set(later.methods):
            if self.methods[name] != later.methods[name]:
                raise ValueError(
                    f"{name} is {self.methods[name]} in one session and {later.methods[name]} in the other; "
                    "choose final points once, on the tuning seeds"
                )
        points = {
            point: {**self.points.get(point, {}), **later.points.get(point, {})}
            for point in {**self.points, **later.points}
        }
        methods = {**self.methods, **later.methods}
        return replace(later, methods=methods, base={**self.base, **later.base}, points=points)


def _check_nested(task: str, played: Mapping[str, Mapping[int, bool]]) -> None:
    """Of any two policies one must have played all of the other's layouts."""
    for (one, few), (other, more) in pairwise(sorted(played.items(), key=lambda item: len(item[1]))):
        if not few:
            raise ValueError(f"{one} was not played on {task}; play every policy on every task")
        if not set(few) <= set(more):
            raise ValueError(
                f"{one} was played on layouts of {task} that {other} was not, {sorted(set(few) - set(more))[:5]}; "
                "give both the same first layout"
            )
