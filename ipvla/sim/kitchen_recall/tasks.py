"""The kitchen's memory tasks as data: what is shown, what has to be put where, timing, chance levels, and BDDL.

Recall's questions on LIBERO's kitchen objects. Objects light up, the lights go out, and only then the arm is free
to put one object on one plate; the first object that lies on a plate without the hand decides the episode.

Chance is the success of a policy that moves well but has no memory, 1/3 in every family but `shown`. No such
policy can do better: from when the arm comes free, pictures, state and instruction are the same to the last bit
whatever was shown, and what was shown is drawn uniformly and independently of the layout.

* **shown** is the same task with the light on to the end: what is wanted is seen, nothing must be remembered. With
  the same seed it has the layout and the wanted object of `recall`.
* **recall** tests remembering which of three equal objects was lit.
* **delay** is recall with a longer delay.
* **order** tests remembering a sequence: all three light up, one after another, and the instruction asks for the
  first, the second or the last. Knowing which have been lit tells nothing.
* **count** tests counting: one bowl lights up once, twice or three times, and the plate on which it has to go
  depends on how often.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

from ipvla.sim.recall.tasks import RecallTask

#: Raised whenever a change makes results incomparable with earlier ones.
VERSION: Final = "1"
SUITE: Final = "kitchen_recall"

#: A policy that looks every 4 steps sees every light twice, and the dark between two of them.
_CUE_STEPS = 8
_GAP_STEPS = 4
_DELAY_STEPS = 10
#: What one pick and place may take, about twice what the expert needs.
_MOVING_STEPS = 220
_BOWL: Final = "akita_black_bowl"

#: x and y in metres from the table's centre, from where to where: (x0, y0, x1, y1).
_OBJECTS_M = (-0.22, -0.22, -0.06, 0.22)
_PLATE_M = (0.05, -0.15, 0.10, 0.15)
_PLATES_M = tuple((0.04, y - 0.02, 0.08, y + 0.02) for y in (-0.22, 0.0, 0.22))


@dataclass(frozen=True)
class KitchenTask(RecallTask):
    """A task of this suite; `items` is the most times that something lights up.

    Attributes:
        asked: of the objects that light up, in their order, the number of the one that has to be moved, from 0.
        counted: the first object is the only one, and how often it lights up says on which plate it goes.
        lasting: the object that is asked for stays lit to the end.
    """

    asked: int = 0
    counted: bool = False
    lasting: bool = False

    @property
    def plates(self) -> tuple[str, ...]:
        """Their names, from left to right in the picture."""
        return tuple(f"plate_{i + 1}" for i in range(3 if self.counted else 1))


def _task(name: str, family: str, phrasings: tuple[str, ...], **differs: Any) -> KitchenTask:
    task = KitchenTask(
        name=name,
        family=family,
        phrasings=phrasings,
        horizon=0,
        chance=1 / 3,
        objects=(_BOWL,) * 3,
        items=1,
        cue_steps=_CUE_STEPS,
        gap_steps=_GAP_STEPS,
        delay_steps=_DELAY_STEPS,
    )
    task = replace(task, **differs)
    return replace(task, horizon=task.locked_steps + _MOVING_STEPS)


def _recall(word: str, category: str) -> KitchenTask:
    phrasings = (
        f"put the {word} that lit up on the plate",
        f"place the {word} that was lit at the start on the plate",
        f"remember which {word} lights up and put it on the plate",
    )
    return _task(f"recall_{word}", "recall", phrasings, objects=(category,) * 3)


def _order(asked: int, word: str) -> KitchenTask:
    phrasings = (
        f"put the bowl that lit up {word} on the plate",
        f"place the bowl that was lit {word} on the plate",
        f"remember which bowl lights up {word} and put it on the plate",
    )
    return _task(f"order_{word}", "order", phrasings, items=3, asked=asked)


_RECALL_BOWL = _recall("bowl", _BOWL)

TASKS: Final[tuple[KitchenTask, ...]] = (
    _task(
        "shown_bowl",
        "shown",
        (
            "put the bowl that is lit on the plate",
            "place the lit bowl on the plate",
            "pick up the bowl that is lit and put it on the plate",
        ),
        lasting=True,
        chance=0.0,
    ),
    _RECALL_BOWL,
    _recall("mug", "red_coffee_mug"),
    *(_order(asked, word) for asked, word in enumerate(("first", "second", "last"))),
    _task(
        "count_bowl",
        "count",
        (
            "put the bowl on the left plate if it lit up once the middle one if twice the right one if thrice",
            "count how often the bowl lights up and put it on the left middle or right plate for one two or three",
            "place the bowl on the left middle or right plate after it lit up one two or three times",
        ),
        objects=(_BOWL,),
        items=3,
        counted=True,
    ),
)

_DELAY_NAME = re.compile(r"recall_bowl_delay_([1-9][0-9]*)")
_DELAYS = range(10, 201)


def unlisted_task(name: str) -> KitchenTask | None:
    """The task of this name that `TASKS` leaves out: `recall_bowl_delay_<n>`, n of 10 to 200 control steps.

    Raises:
        ValueError: the delay is outside that range.
    """
    match = _DELAY_NAME.fullmatch(name)
    if match is None:
        return None
    steps = int(match[1])
    if steps not in _DELAYS:
        raise ValueError(
            f"{name!r} has a delay of {steps} control steps; choose one of {_DELAYS[0]} to {_DELAYS[-1]}"
        )
    horizon = _RECALL_BOWL.horizon - _RECALL_BOWL.delay_steps + steps
    return replace(_RECALL_BOWL, name=name, family="delay", horizon=horizon, delay_steps=steps)


def bddl_text(task: KitchenTask) -> str:
    """The task's BDDL file: objects and where they begin. What decides the episode is not LIBERO's goal."""
    objects_m = dict.fromkeys(task.names, _OBJECTS_M)
    plates_m = dict(zip(task.plates, _PLATES_M if task.counted else (_PLATE_M,), strict=True))
    places = plates_m | objects_m
    regions = "\n    ".join(
        f"({name}_region (:target kitchen_table) (:ranges (({' '.join(map(str, where))}))))"
        for name, where in places.items()
    )
    initial = "\n    ".join(f"(On {name} kitchen_table_{name}_region)" for name in places)
    return f"""(define (problem LIBERO_Kitchen_Tabletop_Manipulation)
  (:domain robosuite)
  (:language {task.phrasings[0]})
  (:regions
    {regions}
  )
  (:fixtures
    kitchen_table - kitchen_table
  )
  (:objects
    {" ".join(task.names)} - {task.objects[0]}
    {" ".join(task.plates)} - plate
  )
  (:obj_of_interest {" ".join(task.names)})
  (:init
    {initial}
  )
  (:goal (And (On {task.names[0]} {task.plates[0]})))
)
"""
