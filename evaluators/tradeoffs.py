"""Trade-offs of new-task success against retention: what policies did, layout by layout, drawn again together.

Success is a mean over families of means over their tasks, however many layouts a task was played on.

One draw takes the same seeds and layouts from every method, so whatever is computed from it is paired. A seed that
is drawn brings the layouts that it alone played: to draw these again would count their chance twice. Layouts that
several seeds played are drawn too, within their task, and those that only some policies played apart from the
others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from evaluators.forgetting import Estimate, FloatArray, interval
from evaluators.pareto import area, retention_at
from evaluators.success_table import SuccessRow
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
        rows: Iterable[SuccessRow] = (),
        kl: float | None = None,
        drift: float | None = None,
    ) -> Self:
        """From episodes, those of the tasks `new` apart from the others, and from the answers' rows."""
        outcomes: tuple[dict[str, dict[int, bool]], dict[str, dict[int, bool]]] = ({}, {})
        for result in results:
            task = result.spec.task
            outcomes[task not in new].setdefault(task, {})[result.spec.trial] = result.success
        questions = {row.name: (row.k, row.n) for row in rows if row.name != "all"}
        return cls(*outcomes, questions, kl, drift)

    @property
    def accuracy(self) -> float | None:
        """Share of all questions that were answered right; None if none was asked."""
        asked = sum(n for _, n in self.questions.values())
        return sum(k for k, _ in self.questions.values()) / asked if asked else None

    @property
    def episodes(self) -> dict[str, int]:
        """How many of the new task and of the old skills."""
        return {part: sum(len(layouts) for layouts in getattr(self, part).values()) for part in ("new", "old")}


def success(outcomes: Outcomes, skills: Mapping[str, Skill]) -> float:
    """Mean over families of means over their tasks, in [0, 1]."""
    families: dict[str, list[float]] = {}
    for task, skill in skills.items():
        families.setdefault(skill.family, []).append(float(np.mean(list(outcomes[task].values()))))
    return float(np.mean([np.mean(rates) for rates in families.values()]))


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
        for fault in self._faults():
            raise ValueError(fault)
        for seed in self.seeds:
            policies = {"the base": self.base[seed]} | {str(p): played[seed] for p, played in self.points.items()}
            for part in ("new", "old"):
                for task in getattr(self, part):
                    _check_nested(task, {name: getattr(p, part).get(task, {}) for name, p in policies.items()})

    def _faults(self) -> Iterable[str]:
        """In names and seeds."""
        baselines = [name for name, entry in self.methods.items() if entry.role == "baseline"]
        if not (self.new and self.old and self.base):
            yield "a comparison needs a new task, an old skill, and the base of one training seed at least"
        if both := sorted(set(self.new) & set(self.old)):
            yield f"tasks {both} are new and old; decide on one"
        if strangers := {point.method for point in self.points} - set(self.methods):
            yield f"points of {sorted(strangers)}; say in `methods` what these are"
        for name, entry in self.methods.items():
            if entry.final.method != name or entry.final not in self.points:
                yield f"the final point of {name} is {entry.final}; it must be one of its points"
        if self.ours not in self.methods or self.methods[self.ours].role != "ours":
            yield f"ours is {self.ours!r}; name a method whose role is ours"
        if len(baselines) != 1:
            yield f"the baselines are {baselines}; give exactly one method this role"
        if self.loop and not {"closed", "shuffled"} <= set(self.loop) <= set(LOOPS):
            yield f"loop has {sorted(self.loop)}; give closed and shuffled, of {', '.join(LOOPS)}"
        if unknown := [name for name in self.loop.values() if name not in self.methods]:
            yield f"loop names {unknown}; name methods, of {', '.join(self.methods)}"
        for point, seeds in self.points.items():
            if set(seeds) != set(self.base):
                yield (
                    f"{point} was played with training seeds {sorted(seeds)}, the base with {sorted(self.base)}; "
                    "play every point with every seed"
                )

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
        return {name: self.area(self.comparison.points_of(name)) for name in self.comparison.methods}

    def area(self, points: Iterable[Point]) -> FloatArray:
        """Under the front of these points, float64 [draws + 1]."""
        return np.array([area(drawn) for drawn in self.of(points)])

    def of(self, points: Iterable[Point]) -> FloatArray:
        """float64 [draws + 1, P, 2]."""
        return self.points[:, [self.place(point) for point in points]]

    def place(self, point: Point | None) -> int:
        """Of a point among the policies; None for the base."""
        return 0 if point is None else 1 + self._places[point]

    def estimate(self, values: FloatArray) -> dict[str, float | None]:
        """Of values in every draw, [draws + 1]."""
        return rounded(interval(float(values[0]), values[1:], len(self.comparison.seeds)))

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
        rows = [[[outcomes.get(i, math.nan) for i in layouts] for outcomes in seeds] for seeds in played]
        return np.array(rows, np.float64)


def _weights(rng: np.random.Generator, strata: npt.NDArray[np.int64], draws: int) -> FloatArray:
    """How often each of n things is drawn, with replacement within its stratum [n]: float64 [draws + 1, n].

    Draw 0 takes each once, and stratum -1 is always taken as it is.
    """
    weights = np.ones((draws + 1, len(strata)))
    for stratum in np.unique(strata[strata >= 0]):
        members = np.flatnonzero(strata == stratum)
        weights[1:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
    return weights


def rounded(estimate: Estimate) -> dict[str, float | None]:
    """Four significant digits, None for NaN."""
    return {name: None if math.isnan(value) else float(f"{value:.4g}") for name, value in asdict(estimate).items()}


def forgetting_at_equal_success(drawn: Drawn, first: str, second: str) -> FloatArray:
    """What two methods forget at the same new-task success: float64 [draws + 1, 3], that success, then each's.

    The success is the largest that both fronts reach; in every draw it is that draw's own.
    Forgetting is the base's retention minus the front's there, in [-1, 1].
    """
    base = drawn.points[:, 0, 1]
    fronts = zip(*(drawn.of(drawn.comparison.points_of(name)) for name in (first, second)), strict=True)
    rows = []
    for retained, (one, two) in zip(base, fronts, strict=True):
        level = min(one[:, 0].max(), two[:, 0].max())
        rows.append((level, retained - retention_at(one, level), retained - retention_at(two, level)))
    return np.array(rows)
