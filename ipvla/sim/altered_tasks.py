"""Tasks that no suite lists, by name: the scene of a task with another goal, or with other words.

- `GOAL-in-SCENE` plays episodes of task SCENE with the instruction of task GOAL, and is done when GOAL is. Whether
  SCENE's own goal was reached meanwhile is in the episode's details: a policy that does not hear reaches that.
- `TASK-said-KIND` plays episodes of TASK, and says it by a paraphrase: KIND is "action" or "object"
  (`ipvla.sim.instructions`).

Their episodes have the layouts and initial states of the task itself: the same seed is the same world.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from ipvla.choices import did_you_mean
from ipvla.sim.instructions.sets import DIFFICULTIES, InstructionsError, instruction_set
from ipvla.sim.simulator import Task

AnyTask = TypeVar("AnyTask", bound=Task)

_IN: Final = "-in-"
_SAID: Final = "-said-"
#: Family of the first kind, and the entry of an episode's details: was the scene's own goal reached?
GOAL_SWAP: Final = "goal_swap"
SCENE_GOAL: Final = "scene_goal"


def swapped_name(goal: str, scene: str) -> str:
    """The name of the task that plays `goal` in the scene of `scene`."""
    return f"{goal}{_IN}{scene}"


def goal_and_scene(name: str) -> tuple[str, str] | None:
    """Of a name as `swapped_name` makes it; None for another."""
    goal, found, scene = name.partition(_IN)
    return (goal, scene) if found else None


def said_name(task: str, kind: str) -> str:
    """The name of the task that is said by paraphrases of a kind."""
    return f"{task}{_SAID}{kind}"


def task_and_kind(name: str) -> tuple[str, str] | None:
    """Of a name as `said_name` makes it; None for another. ValueError if there is no such kind."""
    task, found, kind = name.partition(_SAID)
    if not found:
        return None
    if kind not in DIFFICULTIES:
        raise ValueError(f"{name!r}: there are no paraphrases {kind!r}; choose {' or '.join(DIFFICULTIES)}")
    return task, kind


def scene_of(name: str) -> str:
    """The task whose world it plays in: itself, if it is listed."""
    if (swapped := goal_and_scene(name)) is not None:
        return swapped[1]
    return name.partition(_SAID)[0]


def goal_of(name: str) -> str:
    """The task that it demands: itself, if it is listed."""
    return name.partition(_IN)[0].partition(_SAID)[0]


def listed(suite: str, tasks: Iterable[AnyTask], name: str) -> AnyTask:
    """The task of this name among those that a suite lists. ValueError if it is none of them."""
    by_name = {task.name: task for task in tasks}
    if name not in by_name:
        raise ValueError(f"{name!r} is no task of suite {suite}; {did_you_mean(name, by_name)}")
    return by_name[name]


def paraphrases(suite: str, task: Task, kind: str) -> tuple[str, ...]:
    """Other words for a task.

    Raises:
        InstructionsError: the suite has no set of instructions, or it has none of this kind for the task.
    """
    instructions = instruction_set(suite)
    wording = instructions.find(task.phrasings[0])
    if wording is None or kind not in wording.synonyms:
        raise InstructionsError(f"{instructions.path} has no {kind} synonyms of {task.phrasings[0]!r}; add some")
    return wording.synonyms[kind]
