"""Decides an episode of the kitchen's memory tasks: Recall's state machine, with objects on plates as presses."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from ipvla.sim.kitchen_recall.tasks import KitchenTask
from ipvla.sim.recall.state_machine import StateMachine


@dataclass
class KitchenMachine(StateMachine):
    """What "presses" are: the index of the object that lies on the plate; of a `counted` task, that of the plate.

    Attributes:
        cues: indices of the objects in the order in which they light up; of a `counted` task, that of the plate.
    """

    task: KitchenTask

    @property
    def program(self) -> tuple[int, ...]:
        return (self.cues[self.task.asked],)

    @property
    def wanted(self) -> tuple[int, int]:
        """(the object that has to be moved, the plate on which it goes)."""
        return (0, self.cues[0]) if self.task.counted else (self.program[0], 0)

    @property
    def shown(self) -> tuple[int, ...]:
        return () if self.task.counted else super().shown

    @property
    def lit(self) -> tuple[int, ...]:
        if self.task.lasting:
            return self.program
        if not self.task.counted:
            return super().lit
        flash, since = divmod(self.t, self.task.cue_steps + self.task.gap_steps)
        return (0,) if flash <= self.cues[0] and since < self.task.cue_steps else ()


def draw_cues(task: KitchenTask, seed: int) -> tuple[int, ...]:
    """What lights up in the episode of this seed. Of one seed, tasks with as many objects have the same."""
    rng = np.random.default_rng([seed, zlib.crc32(b"kitchen_recall/cue")])
    order = tuple(rng.permutation(3).tolist())
    return order[:1] if task.counted else order[: task.items]


def draw_instruction(task: KitchenTask, seed: int) -> str:
    """One of the task's phrasings."""
    rng = np.random.default_rng([seed, zlib.crc32(b"kitchen_recall/phrasing")])
    return task.phrasings[int(rng.integers(len(task.phrasings)))]
