"""What demonstrations say in words: the plan that an episode has earned so far, and questions about its picture.

A plan has two tags of Embodied Chain-of-Thought (`ipvla.reasoning`): `PLAN` is what has to be done, `SUBTASK` the
number of the sub-goal that is due and the sub-goal itself. Both change only with what they speak of:

* ground: `PLAN: press red SUBTASK: 1 press red`
* count: `PLAN: red red blue SUBTASK: 2 press red`
* place: `PLAN: cube bowl SUBTASK: 1 pick cube`, once the cube is up `PLAN: cube bowl SUBTASK: 2 place bowl`
* recall, delay: `PLAN: press 7 12 SUBTASK: 1 press 7 12`; 7 and 12 are column and row of the button in the
  picture, counted from its upper left corner on a grid of 16 x 16 cells
* items, order: `PLAN: press 7 12 3 4 SUBTASK: 2 press 3 4`; buttons that have not lit up yet are not in the plan
* cups, shuffle: as recall; the place changes when a swap of that cup has ended
* chase: as ground
* glimpse: as recall, once a button has lit up; before that `PLAN: wait SUBTASK: 1 wait until button lights`

Questions about the present picture have their answers from the true state:

* colour: `what color is the left button` - `red`
* side: `is the red button left or right of the blue one` - `left`
* count: `how many buttons are there` - `three`
* lit: `is a button lit` - `yes`, and `which button is lit` - `middle`

Only what the picture decides is asked: nothing about what the arm hides, about places that differ by less than
`MARGIN`, about the colour that a button has under its light, or about light beside a yellow button, which looks
alike. And only what the words alone do not decide: bowls are always white, so their colour is not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ipvla.reasoning import Reasoning
from ipvla.sim.recall.episode import Episode, places
from ipvla.sim.recall.scene import BOWL_RADIUS_M, BUTTON_RADIUS_M, CUBE_HALF_SIZE_M, CUP_RADIUS_M, Cell
from ipvla.sim.recall.state_machine import StateMachine

if TYPE_CHECKING:
    from ipvla.sim.recall.problem import RecallProblem

KINDS: Final = ("colour", "side", "count", "lit")
#: Things whose places differ by less are as good as one above the other, in parts of the picture's side.
MARGIN: Final = 0.08

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_COLOUR_OF = {"bowl": "white", "cup": "purple"}
_RADIUS_M = {
    "button": BUTTON_RADIUS_M,
    "cup": CUP_RADIUS_M,
    "cube": CUBE_HALF_SIZE_M,
    "bowl": BOWL_RADIUS_M,
}
#: Points of a thing's upper side, in parts of its radius, and how many of them must be in sight.
_LOOKED_AT = np.array([(0, 0, 0), (0.7, 0, 0), (-0.7, 0, 0), (0, 0.7, 0), (0, -0.7, 0)])
_IN_SIGHT = 3
_DRAWN_GROUPS = np.array([0, 1, 0, 0, 0, 0], np.uint8)


def plan_text(episode: Episode, machine: StateMachine, cells: Sequence[Cell], carried: bool = False) -> str:
    """The plan as it should read once the observation of control step `machine.t` has been seen; nothing later.

    Args:
        machine: the episode's progress; it also has the task.
        cells: for each object, where the picture shows the place in which it stood at the start.
        carried: place: the object is above the table or over its goal.
    """
    task = machine.task
    if task.items and not machine.shown:
        return _format(["wait"], 1, "wait", "until button lights")
    if task.items:
        where = places(task, episode.swaps, machine.t)
        goals = {button: " ".join(map(str, cells[where[button]])) for button in machine.shown}
        plan = ["press", *goals.values()]
        due = next((button for button in machine.todo if button in goals), machine.shown[-1])
        return _format(plan, _number(machine, len(goals)), "press", goals[due])
    colours = [task.objects[i].partition("_")[0] for i in task.program]
    if colours:
        number = _number(machine, len(colours))
        plan = colours if task.family == "count" else ["press", *colours]
        return _format(plan, number, "press", colours[number - 1])
    cargo, goal = (category.rpartition("_")[2] for category in task.objects)
    return _format([cargo, goal], *((2, "place", goal) if carried else (1, "pick", cargo)))


def _number(machine: StateMachine, goals: int) -> int:
    return min(machine.progress, goals - 1) + 1


def _format(plan: Sequence[str], number: int, verb: str, goal: str) -> str:
    return Reasoning({"PLAN": " ".join(plan), "SUBTASK": f"{number} {verb} {goal}"}).format()


@dataclass(frozen=True)
class Question:
    """kind: of `KINDS`; text and answer: lower-case words without punctuation, the answer a single one."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """An object as the picture shows it now.

    Attributes:
        sort: "button", "cup", "cube" or "bowl".
        colour: in a word; None while a light or glass covers it.
        right: how far right its upper side's middle is, in parts of the picture's side from the left edge.
        seen: more of it is in sight than hidden.
        lit: it is a button that shows a cue, or acknowledges a press.
    """

    sort: str
    colour: str | None
    right: float
    seen: bool = True
    lit: bool = False


def look(problem: RecallProblem) -> tuple[Thing, ...]:
    """The task's objects, in its order, as the next observation will show them; the world stays as it is."""
    machine = problem.machine
    shining = {*machine.lit, machine.flashing}
    things = []
    for index, category in enumerate(problem.task.objects):
        colour, _, sort = category.rpartition("_")
        lit = index in shining
        right, down = problem.camera().project(problem.top_m(index))
        things.append(
            Thing(
                sort=sort,
                colour=None if lit else colour or _COLOUR_OF[sort],
                right=right,
                seen=0 < right < 1 and 0 < down < 1 and _in_sight(problem, index, _RADIUS_M[sort]),
                lit=lit and sort == "button",
            )
        )
    return tuple(things)


def questions(things: Sequence[Thing]) -> tuple[Question, ...]:
    """All that can be asked about these things, in every phrasing."""
    makers = {"colour": _colour, "side": _side, "count": _count, "lit": _lit}
    return tuple(Question(kind, text, answer) for kind in KINDS for text, answer in makers[kind](things))


def draw(asked: Sequence[Question], rng: np.random.Generator) -> Question | None:
    """One of them: the kinds that occur equally often, within a kind each question. None where there are none."""
    kinds = [kind for kind in KINDS if any(question.kind == kind for question in asked)]
    if not kinds:
        return None
    kind = kinds[rng.integers(len(kinds))]
    of_kind = [question for question in asked if question.kind == kind]
    return of_kind[rng.integers(len(of_kind))]


def _colour(things: Sequence[Thing]) -> Iterator[tuple[str, str]]:
    for place, button in _places(_buttons(things)):
        if button.colour is not None:
            yield f"what color is the {place} button", button.colour
            yield f"what is the colour of the {place} button", button.colour


def _side(things: Sequence[Thing]) -> Iterator[tuple[str, str]]:
    looks = Counter((thing.sort, thing.colour) for thing in things)
    clear = [t for t in things if t.seen and t.colour is not None and looks[t.sort, t.colour] == 1]
    for one, other in permutations(clear, 2):
        if abs(one.right - other.right) >= MARGIN:
            side = "left" if one.right < other.right else "right"
            short = "one" if one.sort == other.sort else other.sort
            yield f"is the {one.colour} {one.sort} left or right of the {other.colour} {short}", side
            short = "one" if one.sort == other.sort else one.sort
            yield f"on which side of the {other.colour} {other.sort} is the {one.colour} {short}", side


def _count(things: Sequence[Thing]) -> Iterator[tuple[str, str]]:
    buttons = _buttons(things)
    if buttons and all(button.seen for button in buttons):
        yield "how many buttons are there", _NUMBERS[len(buttons)]
        yield "count the buttons", _NUMBERS[len(buttons)]


def _lit(things: Sequence[Thing]) -> Iterator[tuple[str, str]]:
    buttons = _buttons(things)
    if not buttons or any(button.colour == "yellow" for button in buttons):
        return
    lit = [button for button in buttons if button.lit]
    if all(button.seen for button in buttons) or any(button.seen for button in lit):
        yield "is a button lit", "yes" if lit else "no"
        yield "is any of the buttons lit", "yes" if lit else "no"
    for place, button in _places(buttons):
        if [button] == lit:
            yield "which button is lit", place
            yield "where is the button that is lit", place


def _buttons(things: Sequence[Thing]) -> list[Thing]:
    return [thing for thing in things if thing.sort == "button"]


def _places(group: Sequence[Thing]) -> list[tuple[str, Thing]]:
    """The things that a word tells apart, if all are in sight: left and right one, and of three the middle one."""
    row = sorted(group, key=lambda thing: thing.right)
    clear = [after.right - before.right >= MARGIN for before, after in pairwise(row)]
    if not clear or not all(thing.seen for thing in row):
        return []
    left = [("left", row[0])] if clear[0] else []
    middle = [("middle", row[1])] if len(row) == 3 and all(clear) else []
    right = [("right", row[-1])] if clear[-1] else []
    return [*left, *middle, *right]


def _in_sight(problem: RecallProblem, index: int, radius_m: float) -> bool:
    """Do most rays from the camera reach the object before anything else that is drawn?"""
    import mujoco

    model, data = problem.sim.model._model, problem.sim.data._data
    body, eye = problem.obj_body_id[problem.task.names[index]], problem.camera().position_m
    hit: npt.NDArray[np.int32] = np.zeros(1, np.int32)
    reached = 0
    for point in problem.top_m(index) + radius_m * _LOOKED_AT:
        mujoco.mj_ray(model, data, eye, point - eye, _DRAWN_GROUPS, 1, -1, hit)
        reached += hit[0] >= 0 and model.geom_bodyid[hit[0]] == body
    return reached >= _IN_SIGHT
