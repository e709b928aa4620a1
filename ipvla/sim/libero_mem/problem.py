"""A task of LIBERO-Mem: LIBERO's kitchen, played as its own suites are, decided by sub-goals in their order.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipvla.sim.libero_mem.progress import SubgoalProgress
from ipvla.sim.libero_mem.tasks import SequenceTask
from ipvla.sim.simulator import StepOutcome
from ipvla.sim.standard.problem import StandardProblem

#: By how much an object is lowered at a time, to where it begins.
_LOWERING_M: Final = 0.002


class SequenceProblem(StandardProblem):
    """Every episode begins in a layout drawn from its seed, since no initial states are published.

    LIBERO's samplers put an object that begins on another one ten centimetres above it, from where a bottle falls
    over; here it begins just above what it stands on. Layouts in which things overlap are drawn again.

    Args:
        bddl_file: of `bddl_text(task)`.
        task: the same task as data; it also has the sub-goals, which LIBERO's BDDL cannot say.
        profile, world_seed: as in `StandardProblem`.
    """

    task: SequenceTask

    def __init__(self, bddl_file: Path, task: SequenceTask, profile: str = "exact", world_seed: int = 0) -> None:
        super().__init__(bddl_file, task, None, profile, world_seed)
        self._sequences = task.sequences
        self.progress = SubgoalProgress(self._sequences)

    def begin(self, seed: int) -> None:
        super().begin(seed)
        self.progress = SubgoalProgress(self._sequences)

    def outcome(self) -> StepOutcome:
        return StepOutcome(success=self.progress.success, failure=self.progress.failure)

    def episode_array(self) -> npt.NDArray[np.float64]:
        progress = self.progress.to_array()
        return np.concatenate([super().episode_array(), progress])

    def load_episode_array(self, array: npt.NDArray[np.float64]) -> None:
        numbers = len(self.progress.to_array())
        super().load_episode_array(array[:-numbers])
        self.progress.load_array(array[-numbers:])

    def details(self) -> Mapping[str, Any]:
        progress = self.progress
        return {**super().details(), "subgoals_reached": progress.reached, "subgoals": progress.subgoals}

    def _arrange(self) -> bool:
        """Sets objects down on what they begin on."""
        objects = self.env.objects_dict
        for thing, where in self.task.initial:
            if where in objects:
                self._set_down(objects[thing], objects[where])
        return self._apart(self.task.initial)

    def _set_down(self, thing: Any, support: Any) -> None:
        """Lowers an object until it would touch another one."""
        joint = thing.joints[-1]
        pose = np.array(self.sim.data.get_joint_qpos(joint))
        floor = float(self.sim.data.body_xpos[self.env.obj_body_id[support.name]][2])
        while pose[2] > floor and not self.env.check_contact(thing, support):
            pose[2] -= _LOWERING_M
            self.sim.data.set_joint_qpos(joint, pose)
            self.sim.forward()
        pose[2] += _LOWERING_M
        self.sim.data.set_joint_qpos(joint, pose)
        self.sim.forward()

    def _judge(self) -> None:
        self.progress.advance(self.env._eval_predicate)
