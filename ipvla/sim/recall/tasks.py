"""The Recall suite's tasks as data: families, instructions, timing, horizons and chance levels.

Chance is the success probability of a policy that moves well but ignores what the family tests:

* **ground** tests reading the colour: ignoring it, one of three buttons is pressed, 1/3.
* **recall** tests remembering the cue: without it, the three grey buttons look alike, 1/3. No memoryless
  policy can do better, because the cue is drawn uniformly and the arm stays locked until it is long gone.
* **delay** is recall with a longer delay, 1/3.
* **items** tests remembering several cues at once: ignoring them, k different ones of five grey buttons are
  pressed, one choice of C(5, k): 1/10 for two and for three. A policy that also forgets which buttons it has
  pressed does worse, because a second press of a button fails.
* **order** tests remembering a sequence: ignoring it, k different ones of four grey buttons are pressed in some
  order, one of 4!/(4 - k)!: 1/12 for two and 1/24 for three. Knowing the set alone gives 1/k!.
* **cups** tests following what is out of sight: the three cups look alike once the ball is covered, 1/3. Knowing
  only where the ball was gives 1/3 as well: the swaps' pairs are drawn independently and uniformly, so that after
  two of them the ball is under each of the three places equally often.
* **count** tests knowing how many presses have been made: after every red press such a policy turns to blue
  with some probability p. It then makes exactly one red press with probability p and exactly two with p(1 - p);
  at the fair coin p = 1/2 this is 1/2 and 1/4. For two presses 1/4 is also the best over p, so it bounds
  every policy that turns with one fixed probability. For one press it is only a reference: there the instruction
  alone says "blue follows every red press", and a reactive policy that reads it may do better.
* **place** tests manipulation only: nothing is gained by chance, 0.

Three families in which the world does not wait; none of the others moves anything once the arm is free:

* **chase** tests acting on where a button is, not where it was: it wanders, and the hand goes to where it is. A
  button that is pressed at where it stood at the start is one that happens to come back, 0.
* **glimpse** tests looking often enough and acting at once: one of three grey buttons lights up for a moment, some
  time after the arm is free, and has to be pressed soon. Without having seen the light, 1/3.
* **shuffle** is cups with one swap that begins when the hand is already on its way, 1/3: the pair is drawn
  uniformly, so the ball's cup stays in one of three episodes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Final

from ipvla.sim.altered_tasks import GOAL_SWAP, goal_and_scene, listed, paraphrases, swapped_name, task_and_kind
from ipvla.sim.recall.scene import PALETTE
from ipvla.sim.simulator import Task

#: Raised whenever a change makes results incomparable with earlier ones.
VERSION: Final = "2"

_CUE_STEPS = 5
_DELAY_STEPS = 10
_GAP_STEPS = 3
_SWAP_STEPS = 16
_SWAP_PAUSE_STEPS = 4
_ROAMING_STEP_M = 0.0055  # 0.11 m/s: 4 cm, a button's radius, in 7 control steps
_FLASH_STEPS = 8  # 0.4 s: a policy that looks every 4 steps sees every press twice


@dataclass(frozen=True)
class RecallTask(Task):
    """A task of the Recall suite. Times are in control steps (1/20 s).

    Attributes:
        objects: LIBERO object categories in the scene, e.g. `red_button`; one category may stand several times.
        program: indices into `objects`: the presses that solve the task, in order. Empty where the cue decides
            (`items` > 0) and where nothing is to be pressed.
        items: how many objects, drawn from the seed, are shown at the start; 0 for no cue.
        ordered: they are shown one after another, and to be pressed in that order; otherwise together, in any.
        cue_steps: how long each of them is shown.
        gap_steps: dark steps between two of them, if ordered.
        swaps: how many times two objects change places after the cue.
        swap_steps: how long each swap takes.
        swap_pause_steps: rest before each swap.
        delay_steps: how long the arm stays locked after cue and swaps, until the go-lamp comes on.
        free_from: the control step from which the arm is free, where this is not after cue, swaps and delay.
        cue_from: the first and the last control step at which the cue may begin; the episode draws one of them.
        deadline_steps: from the cue's beginning, within which the presses are to be made; 0 for the horizon alone.
        roaming: indices into `objects` of those that wander about all the time.
        roaming_step_m: how far they go in a control step.
        flash_steps: how long a button acknowledges a press by turning white.
        scene: the task whose layouts it has; "" for its own.
        scene_program: where the goal is another one than the scene's (`ipvla.sim.altered_tasks`), the program of
            the scene's own task.
    """

    objects: tuple[str, ...]
    program: tuple[int, ...] = ()
    items: int = 0
    ordered: bool = True
    cue_steps: int = 0
    gap_steps: int = 0
    swaps: int = 0
    swap_steps: int = 0
    swap_pause_steps: int = 0
    delay_steps: int = 0
    free_from: int | None = None
    cue_from: tuple[int, int] = (0, 0)
    deadline_steps: int = 0
    roaming: tuple[int, ...] = ()
    roaming_step_m: float = _ROAMING_STEP_M
    flash_steps: int = _FLASH_STEPS
    scene: str = ""
    scene_program: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names in the scene, e.g. `gray_button_2`: the category and its running number."""
        return tuple(f"{c}_{self.objects[: i + 1].count(c)}" for i, c in enumerate(self.objects))

    @property
    def delivers(self) -> bool:
        """There is nothing to press: the first object has to get into the second one."""
        return not self.program and not self.items

    @property
    def shown_steps(self) -> int:
        """Control steps from the beginning of the cue until all of it has been shown."""
        if not self.ordered:
            return self.cue_steps
        return self.items * self.cue_steps + max(self.items - 1, 0) * self.gap_steps

    def swap_start(self, index: int) -> int:
        """The control step from which the `index`-th swap moves its objects."""
        return self.shown_steps + index * self.swap_steps + (index + 1) * self.swap_pause_steps

    @property
    def rest_from(self) -> int:
        """The control step from which no object moves by itself."""
        if self.roaming:
            return self.horizon
        return self.swap_start(self.swaps - 1) + self.swap_steps if self.swaps else 0

    @property
    def locked_steps(self) -> int:
        """Control steps at the start of an episode in which the arm does not move."""
        if self.free_from is not None:
            return self.free_from
        return self.shown_steps + self.swaps * (self.swap_pause_steps + self.swap_steps) + self.delay_steps


def _ground(colour: str, objects: tuple[str, ...]) -> RecallTask:
    assert colour in PALETTE
    return RecallTask(
        name=f"ground_{colour}",
        family="ground",
        phrasings=(
            f"press the {colour} button",
            f"push the {colour} button",
            f"go to the {colour} button and press it",
            f"touch the button that is {colour}",
        ),
        horizon=80,
        chance=1 / 3,
        objects=objects,
        program=(objects.index(f"{colour}_button"),),
    )


_RECALL = RecallTask(
    name="recall",
    family="recall",
    phrasings=(
        "press the button that lit up",
        "push the button that was lit at the start",
        "press the one that lit up before",
        "remember which button lights up and press it",
    ),
    horizon=100,
    chance=1 / 3,
    objects=("gray_button",) * 3,
    items=1,
    cue_steps=_CUE_STEPS,
    delay_steps=_DELAY_STEPS,
)

_DELAY_NAME = re.compile(r"recall_delay_([1-9][0-9]*)")
_DELAYS = range(10, 201)


def _delay(steps: int) -> RecallTask:
    horizon = _RECALL.horizon - _RECALL.delay_steps + steps
    return replace(_RECALL, name=f"recall_delay_{steps}", family="delay", horizon=horizon, delay_steps=steps)


_WORDS = {2: "two", 3: "three"}


def _several(family: str, count: int, phrasings: tuple[str, ...], **differs: Any) -> RecallTask:
    """`recall` with `count` cues, `{}` in a phrasing being that number; `differs` is what else is not as there."""
    texts = tuple(phrasing.format(_WORDS[count]) for phrasing in phrasings)
    return replace(_RECALL, name=f"{family}_{count}", family=family, phrasings=texts, items=count, **differs)


def _items(count: int) -> RecallTask:
    phrasings = (
        "press the {} buttons that lit up",
        "push each of the {} buttons that were lit at the start",
        "remember which {} buttons light up and press them",
    )
    horizon, chance = 60 + 40 * count, 1 / math.comb(5, count)
    objects = ("gray_button",) * 5
    return _several("items", count, phrasings, horizon=horizon, chance=chance, objects=objects, ordered=False)


def _order(count: int) -> RecallTask:
    phrasings = (
        "press the {} buttons in the order in which each lit up",
        "push the {} buttons in the sequence that was shown",
        "remember the {} lights and press the buttons in the same order",
    )
    horizon, chance = 60 + 45 * count, 1 / math.perm(4, count)
    objects = ("gray_button",) * 4
    return _several(
        "order", count, phrasings, horizon=horizon, chance=chance, objects=objects, gap_steps=_GAP_STEPS
    )


_COLOURED = ("red_button", "green_button", "blue_button")

TASKS: Final[tuple[RecallTask, ...]] = (
    _ground("red", _COLOURED),
    _ground("green", _COLOURED),
    _ground("blue", _COLOURED),
    _ground("yellow", ("red_button", "green_button", "yellow_button")),
    _RECALL,
    RecallTask(
        name="count_red2_blue1",
        family="count",
        phrasings=(
            "press the red button twice then the blue button",
            "push red two times and then blue",
            "first press red twice and after that press blue",
        ),
        horizon=130,
        chance=1 / 4,
        objects=("red_button", "blue_button"),
        program=(0, 0, 1),
    ),
    RecallTask(
        name="count_red1_blue1",
        family="count",
        phrasings=(
            "press the red button once then the blue button",
            "push red one time and then blue",
            "first press red once and after that press blue",
        ),
        horizon=110,
        chance=1 / 2,
        objects=("red_button", "blue_button"),
        program=(0, 1),
    ),
    RecallTask(
        name="place",
        family="place",
        phrasings=(
            "put the red cube in the bowl",
            "place the red cube into the bowl",
            "pick up the red cube and drop it in the bowl",
            "move the red cube to the bowl",
        ),
        horizon=140,
        chance=0.0,
        objects=("red_cube", "bowl"),
    ),
    *map(_delay, (20, 50, 100, 200)),
    *map(_items, (2, 3)),
    *map(_order, (2, 3)),
    RecallTask(
        name="cups",
        family="cups",
        phrasings=(
            "press the cup that has the red ball in it",
            "remember where the red ball is and touch the cup",
            "push the cup with the red ball hidden under it",
        ),
        horizon=150,
        chance=1 / 3,
        objects=("cup",) * 3,
        items=1,
        cue_steps=_CUE_STEPS,
        swaps=2,
        swap_steps=_SWAP_STEPS,
        swap_pause_steps=_SWAP_PAUSE_STEPS,
        delay_steps=_DELAY_STEPS,
    ),
    RecallTask(
        name="chase",
        family="chase",
        phrasings=(
            "press the red button while it moves",
            "push the red button that moves",
            "touch the button that is red while it moves",
        ),
        horizon=80,
        chance=0.0,
        objects=("red_button", "green_button"),
        program=(0,),
        free_from=_CUE_STEPS,
        roaming=(0,),
    ),
    RecallTask(
        name="glimpse",
        family="glimpse",
        phrasings=(
            "press the button when it lights up",
            "wait until a button lights up then press it",
            "push the button that lights up at once",
        ),
        horizon=95,
        chance=1 / 3,
        objects=("gray_button",) * 3,
        items=1,
        cue_steps=8,  # a policy that looks every 8 steps sees it once
        free_from=_CUE_STEPS,
        cue_from=(10, 45),
        deadline_steps=45,
    ),
    RecallTask(
        name="shuffle",
        family="shuffle",
        phrasings=(
            "press the cup with the red ball under it",
            "push the cup that the red ball is under",
            "touch the cup with the red ball in it while they move",
        ),
        horizon=85,
        chance=1 / 3,
        objects=("cup",) * 3,
        items=1,
        cue_steps=_CUE_STEPS,
        swaps=1,
        swap_steps=_SWAP_STEPS,
        swap_pause_steps=15,  # 10 steps after the arm is free
        free_from=10,
    ),
)


def unlisted_task(name: str) -> RecallTask | None:
    """The task of this name that `TASKS` leaves out: `recall_delay_<n>` with any delay of 10 to 200 control steps.

    Also those of `ipvla.sim.altered_tasks`.

    Raises:
        ValueError: the delay is outside that range, or the scene does not allow the goal.
    """
    if (swapped := goal_and_scene(name)) is not None:
        return _swapped(*(listed("recall", TASKS, part) for part in swapped))
    if (said := task_and_kind(name)) is not None:
        task, kind = listed("recall", TASKS, said[0]), said[1]
        return replace(task, name=name, phrasings=paraphrases("recall", task, kind), scene=task.name)
    match = _DELAY_NAME.fullmatch(name)
    if match is None:
        return None
    steps = int(match[1])
    if steps not in _DELAYS:
        raise ValueError(
            f"{name!r} has a delay of {steps} control steps; choose one of {_DELAYS[0]} to {_DELAYS[-1]}"
        )
    return _delay(steps)


def _swapped(goal: RecallTask, scene: RecallTask) -> RecallTask:
    """The goal of one task in the scene of another, of tasks whose instruction says what to press."""
    wanted = {goal.objects[i] for i in goal.program}
    if not (goal.program and scene.program) or any(scene.objects.count(category) != 1 for category in wanted):
        raise ValueError(
            f"{goal.name!r} cannot be done in the scene of {scene.name!r}: both must say which buttons to press, "
            f"and the scene has {', '.join(scene.objects)}"
        )
    program = tuple(scene.objects.index(goal.objects[i]) for i in goal.program)
    if program == scene.program:
        raise ValueError(f"{goal.name!r} is what {scene.name!r} demands anyway; choose another goal")
    return replace(
        scene,
        name=swapped_name(goal.name, scene.name),
        family=GOAL_SWAP,
        phrasings=goal.phrasings,
        horizon=max(goal.horizon, scene.horizon),
        chance=goal.chance,
        program=program,
        scene=scene.name,
        scene_program=scene.program,
    )
