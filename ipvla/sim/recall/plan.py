"""The plan in words that an episode has earned so far: labels for policies that reason in text.

Two tags of Embodied Chain-of-Thought (`ipvla.reasoning`): `PLAN` is what has to be done, `SUBTASK` is the number
of the sub-goal that is due and the sub-goal itself. Both change only with what they speak of:

* ground: `PLAN: press red SUBTASK: 1 press red`
* count: `PLAN: red red blue SUBTASK: 2 press red`
* place: `PLAN: cube bowl SUBTASK: 1 pick cube`, once the cube is up `PLAN: cube bowl SUBTASK: 2 place bowl`
* recall, delay: `PLAN: press 7 12 SUBTASK: 1 press 7 12`; 7 and 12 are column and row of the button in the
  picture, counted from its upper left corner on a grid of 16 x 16 cells
* items, order: `PLAN: press 7 12 3 4 SUBTASK: 2 press 3 4`; buttons that have not lit up yet are not in the plan
* cups: as recall; the place changes when a swap of that cup has ended
"""

from __future__ import annotations

from collections.abc import Sequence

from ipvla.reasoning import Reasoning
from ipvla.sim.recall.episode import Episode
from ipvla.sim.recall.picture import Cell
from ipvla.sim.recall.state_machine import StateMachine
from ipvla.sim.recall.swaps import places


def plan_text(episode: Episode, machine: StateMachine, cells: Sequence[Cell], carried: bool = False) -> str:
    """The plan as it should read once the observation of control step `machine.t` has been seen; nothing later.

    Args:
        machine: the episode's progress; it also has the task.
        cells: for each object, where the picture shows the place in which it stood at the start.
        carried: place: the object is above the table or over its goal.
    """
    task = machine.task
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
