"""The Recall suite's tasks as data: families, instructions, timing, horizons and chance levels.

Chance is the success probability of a policy that moves well but ignores what the family tests:

* **ground** tests reading the colour: ignoring it, one of three buttons is pressed, 1/3.
* **recall** tests remembering the cue: without it, the three grey buttons look alike, 1/3. No memoryless
  policy can do better, because the cue is drawn uniformly and the arm stays locked until it is long gone.
* **count** tests knowing how many presses have been made: after every red press such a policy turns to blue
  with some probability p. It then makes exactly one red press with probability p and exactly two with p(1 - p);
  at the fair coin p = 1/2 this is 1/2 and 1/4. For two presses 1/4 is also the best over p, so it bounds
  every policy that turns with one fixed probability. For one press it is only a reference: there the instruction
  alone says "blue follows every red press", and a reactive policy that reads it may do better.
* **place** tests manipulation only: nothing is gained by chance, 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ipvla.sim.recall.scene import PALETTE
from ipvla.sim.simulator import Task

#: Raised whenever a change makes results incomparable with earlier ones.
VERSION: Final = "1"

_CUE_STEPS = 5
_DELAY_STEPS = 10
_FLASH_STEPS = 8  # 0.4 s: whoever looks every 4 steps sees every press twice


@dataclass(frozen=True)
class RecallTask(Task):
    """A task of the Recall suite. Times are in control steps (1/20 s).

    Attributes:
        objects: LIBERO object categories in the scene, e.g. `red_button`; one category may stand several times.
        program: indices into `objects`: the presses that solve the task, in order. Empty where the cue decides
            (`cue_steps` > 0) and where nothing is to be pressed.
        cue_steps: how long one button, drawn from the seed, is lit at the start; 0 for no cue.
        delay_steps: how long the arm stays locked after the cue, until the go-lamp comes on.
        flash_steps: how long a button acknowledges a press by turning white.
    """

    objects: tuple[str, ...]
    program: tuple[int, ...] = ()
    cue_steps: int = 0
    delay_steps: int = 0
    flash_steps: int = _FLASH_STEPS

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names in the scene, e.g. `gray_button_2`: the category and its running number."""
        return tuple(f"{c}_{self.objects[: i + 1].count(c)}" for i, c in enumerate(self.objects))

    @property
    def locked_steps(self) -> int:
        """Control steps at the start of an episode in which the arm does not move."""
        return self.cue_steps + self.delay_steps


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


_COLOURED = ("red_button", "green_button", "blue_button")

TASKS: Final[tuple[RecallTask, ...]] = (
    _ground("red", _COLOURED),
    _ground("green", _COLOURED),
    _ground("blue", _COLOURED),
    _ground("yellow", ("red_button", "green_button", "yellow_button")),
    RecallTask(
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
        cue_steps=_CUE_STEPS,
        delay_steps=_DELAY_STEPS,
    ),
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
)
