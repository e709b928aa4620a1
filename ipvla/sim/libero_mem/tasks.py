"""LIBERO-Mem's ten tasks (arXiv 2511.11478) as data: objects, where they begin, sub-goals, and BDDL of all that.

Objects, regions and goals are those of its task files `KITCHEN_SCENE1_*.bddl`, commit d04e3ac of
github.com/yyChen-sylvia/libero-mem; regions that nothing begins or ends in are left out. Those files state their
goals with `Sequence` and `Or`, for which LIBERO has no words: they reach the problem as the `SequenceTask` itself.

Chance is the success of a policy that lifts well but does not know how often it has: after every lift it lifts
again with some probability p, so it makes exactly n lifts with p^n (1 - p), at best n^n / (n + 1)^(n + 1). For the
other tasks no bound is known, since a wrong move can be taken back: 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ipvla.sim.libero_mem.progress import Goal
from ipvla.sim.simulator import Task

#: Raised whenever a change makes results incomparable with earlier ones.
VERSION: Final = "1"
SUITE: Final = "libero_mem"
#: Control steps until an episode is over, as the paper has it.
HORIZON: Final = 1000

#: x and y from where to where, in metres from the table's centre: (x0, y0, x1, y1).
Region = tuple[float, float, float, float]

_TABLE: Final = "kitchen_table"


@dataclass(frozen=True)
class SequenceTask(Task):
    """A task of sub-goals in an order.

    Attributes:
        objects: LIBERO category -> names of these objects.
        regions: name on the table -> where.
        initial: (object, where it begins), a region's or an object's name, in the order of drawing.
        sequences: the ways to solve it.
        cabinet: LIBERO's wooden cabinet stands at the table's side.
    """

    objects: tuple[tuple[str, tuple[str, ...]], ...]
    regions: tuple[tuple[str, Region], ...]
    initial: tuple[tuple[str, str], ...]
    sequences: tuple[tuple[Goal, ...], ...]
    cabinet: bool = True


def _on(thing: str, where: str) -> Goal:
    return ("on", thing, where)


_BOWL, _BOTTLE = "akita_black_bowl_1", "wine_bottle_1"
_MIDDLE: Final = ("the_center", (-0.10, -0.17, 0.25, 0.20))
_LIFTED: Final[dict[str, Any]] = {
    "objects": (
        ("akita_black_bowl", (_BOWL,)),
        ("wine_bottle", (_BOTTLE,)),
        ("plate", ("plate_1", "plate_2", "plate_3")),
    ),
    "regions": (
        ("plate_1_region", (-0.25, -0.15, 0.12, -0.01)),
        ("plate_2_region", (-0.25, 0.05, 0.12, 0.20)),
        ("plate_3_region", (-0.25, -0.15, 0.12, 0.20)),
    ),
    "initial": (
        ("plate_1", "plate_1_region"),
        ("plate_2", "plate_2_region"),
        ("plate_3", "plate_3_region"),
        (_BOWL, "plate_1"),
        (_BOTTLE, "plate_2"),
    ),
}
_BASKETS: Final[dict[str, Any]] = {
    "objects": (("cream_cheese", ("cream_cheese_1",)), ("basket", ("basket_1", "basket_2"))),
    "regions": (
        ("basket_1_region", (-0.21, 0.15, -0.19, 0.17)),
        ("basket_2_region", (-0.21, -0.10, -0.19, -0.08)),
        ("cream_cheese_region", (0.00, -0.17, 0.02, 0.20)),
        _MIDDLE,
    ),
    "initial": (
        ("cream_cheese_1", "cream_cheese_region"),
        ("basket_1", "basket_1_region"),
        ("basket_2", "basket_2_region"),
    ),
    "cabinet": False,
}


def _task(number: int, family: str, instruction: str, chance: float = 0.0, **scene: Any) -> SequenceTask:
    name = f"KITCHEN_SCENE1_{number}_{instruction.replace(' ', '_')}"
    return SequenceTask(name, family, (instruction,), HORIZON, chance, **scene)


def _lift(number: int, family: str, instruction: str, goal: Goal, times: int) -> SequenceTask:
    chance = times**times / (times + 1) ** (times + 1)
    return _task(number, family, instruction, chance, sequences=((goal,) * times,), **_LIFTED)


def _bowls(
    number: int, instruction: str, regions: Sequence[Region], sequences: tuple[tuple[Goal, ...], ...], last: int
) -> SequenceTask:
    """Bowls 1 to `last` on the plates of their numbers, the last one drawn first, and one plate more."""
    plates = tuple(f"plate_{i}" for i in range(1, len(regions) + 1))
    bowls = tuple(f"akita_black_bowl_{i}" for i in range(1, last + 1))
    return _task(
        number,
        "relation",
        instruction,
        objects=(("akita_black_bowl", bowls), ("plate", plates)),
        regions=tuple((f"{plate}_region", where) for plate, where in zip(plates, regions, strict=True)),
        initial=(
            *((plate, f"{plate}_region") for plate in plates),
            *((bowls[i], plates[i]) for i in reversed(range(last))),
        ),
        sequences=sequences,
    )


def _moves(*moves: tuple[int, int]) -> tuple[Goal, ...]:
    return tuple(_on(f"akita_black_bowl_{bowl}", f"plate_{plate}") for bowl, plate in moves)


def _baskets(number: int, instruction: str, other: bool) -> SequenceTask:
    """The cheese into a basket, then this one or the other one into the middle."""
    sequences = tuple(
        (
            ("in", "cream_cheese_1", f"basket_{i}_contain_region"),
            _on(f"basket_{3 - i if other else i}", f"{_TABLE}_{_MIDDLE[0]}"),
        )
        for i in (1, 2)
    )
    return _task(number, "occlusion", instruction, sequences=sequences, **_BASKETS)


_ON_PLATE = _on(_BOWL, "plate_1")
_BOTTLE_ON_PLATE = _on(_BOTTLE, "plate_2")

TASKS: Final[tuple[SequenceTask, ...]] = (
    _lift(1, "motion", "pick up the bowl and place it back on the plate", _ON_PLATE, 1),
    _lift(2, "motion", "lift the bottle and put it down on the plate", _BOTTLE_ON_PLATE, 1),
    _lift(3, "sequence", "lift the bowl and place it back on the plate 3 times", _ON_PLATE, 3),
    _lift(4, "sequence", "pick up the bottle and put it down the plate 3 times", _BOTTLE_ON_PLATE, 3),
    _lift(5, "sequence", "lift the bowl and place it back on the plate 5 times", _ON_PLATE, 5),
    _lift(6, "sequence", "pick up the bowl and place it on the plate 7 times", _ON_PLATE, 7),
    _bowls(
        7,
        "swap the 2 bowls on their plates using the empty plate",
        [(-0.25, -0.15, 0.10, 0.15)] * 3,
        (_moves((1, 3), (2, 1), (1, 2)), _moves((2, 3), (1, 2), (2, 1))),
        last=2,
    ),
    _bowls(
        8,
        "rotate the 3 bowls on their plates from left to right using the empty plate",
        [
            (-0.25, -0.15, 0.10, -0.05),
            (-0.25, 0.00, 0.10, 0.10),
            (-0.25, 0.15, 0.10, 0.25),
            (-0.25, -0.15, 0.10, 0.25),
        ],
        (_moves((1, 4), (2, 1), (3, 2), (1, 3)),),
        last=3,
    ),
    _baskets(9, "put the cream cheese in the nearest basket and place that basket in the center", False),
    _baskets(
        10, "put the cream cheese in the nearest basket and place the empty basket in the center", other=True
    ),
)


def bddl_text(task: SequenceTask) -> str:
    """The task's BDDL file. Its goal is the state in which each way to solve it may end, without the order."""
    regions = "\n    ".join(_region(name, _TABLE, where) for name, where in task.regions)
    objects = "\n    ".join(f"{' '.join(names)} - {category}" for category, names in task.objects)
    on_table = {name for name, _ in task.regions}
    initial = "\n    ".join(
        f"(On {thing} {f'{_TABLE}_{where}' if where in on_table else where})" for thing, where in task.initial
    )
    goals = dict.fromkeys(sequence[-1] for sequence in task.sequences)
    cabinet = _region("cabinet_region", _TABLE, (-0.01, -0.29, 0.01, -0.28), yaw="3.141592653589793")
    parts = [f"(:target {thing})" for _, names in task.objects for thing in names if thing.startswith("basket")]
    contained = "\n    ".join(f"(contain_region {part})" for part in parts)
    return f"""(define (problem LIBERO_Kitchen_Tabletop_Manipulation)
  (:domain robosuite)
  (:language {task.phrasings[0]})
  (:regions
    {regions}
    {contained}
    {cabinet if task.cabinet else ""}
  )
  (:fixtures
    {_TABLE} - {_TABLE}
    {"wooden_cabinet_1 - wooden_cabinet" if task.cabinet else ""}
  )
  (:objects
    {objects}
  )
  (:obj_of_interest {" ".join(dict.fromkeys(thing for sequence in task.sequences for _, thing, _ in sequence))})
  (:init
    {f"(On wooden_cabinet_1 {_TABLE}_cabinet_region)" if task.cabinet else ""}
    {initial}
  )
  (:goal (And {" ".join(f"({relation} {thing} {where})" for relation, thing, where in goals)}))
)
"""


def _region(name: str, target: str, where: Region, yaw: str = "0.0") -> str:
    ranges = " ".join(map(str, where))
    return f"({name} (:target {target}) (:ranges (({ranges}))) (:yaw_rotation (({yaw} {yaw}))))"
