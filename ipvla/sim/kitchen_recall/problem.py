"""A kitchen with lights: LIBERO's scene, in which objects light up before the arm is free.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipvla.sim.kitchen_recall.machine import KitchenMachine, draw_cues, draw_instruction
from ipvla.sim.kitchen_recall.tasks import KitchenTask
from ipvla.sim.recall.scene import CUE_RGBA, LAMP_OFF_RGBA, LAMP_ON_RGBA
from ipvla.sim.simulator import StepOutcome
from ipvla.sim.standard.problem import StandardProblem

#: Objects are drawn a centimetre above what they stand on; after so many control steps they stand.
_SETTLING_STEPS: Final = 15
_WAIT: Final = np.array([0.0] * 6 + [-1.0])
_LAMP: Final = "go_lamp"
_VISUAL_GROUP: Final = 1


class KitchenProblem(StandardProblem):
    """Layouts are LIBERO's draws of the seed; what lights up is drawn apart from them.

    Args:
        bddl_file: of `bddl_text(task)`.
        task: the same task as data; it also has the timing.
        profile, world_seed: as in `StandardProblem`.
    """

    task: KitchenTask

    def __init__(self, bddl_file: Path, task: KitchenTask, profile: str = "exact", world_seed: int = 0) -> None:
        self._settled = False
        super().__init__(bddl_file, task, None, profile, world_seed, with_lamp)
        model, bodies = self._model, self.env.obj_body_id
        self._visual = [
            [
                geom
                for geom in range(model.ngeom)
                if model.geom_group[geom] == _VISUAL_GROUP
                and model.body_rootid[model.geom_bodyid[geom]] == model.body_rootid[bodies[name]]
            ]
            for name in task.names
        ]
        self._own_looks = model.geom_matid.copy(), model.geom_rgba.copy()
        self._lamp = model.geom(_LAMP).id

    def begin(self, seed: int) -> None:
        self._settled = False
        super().begin(seed)
        for _ in range(_SETTLING_STEPS):
            super().step(_WAIT)
        self._t, self._settled = 0, True
        self.show(draw_cues(self.task, seed))

    def show(self, cues: tuple[int, ...]) -> None:
        """The episode from its start, with other cues in the same layout."""
        self.machine = KitchenMachine(self.task, cues=cues)

    @property
    def instruction(self) -> str:
        return draw_instruction(self.task, self._seed)

    def step(self, action: npt.NDArray[np.float64]) -> None:
        """One control step; while the arm is locked nothing moves."""
        if self.machine.locked:
            self._t += 1
            self.machine.advance()
        else:
            super().step(action)

    def outcome(self) -> StepOutcome:
        return StepOutcome(success=self.machine.success, failure=self.machine.failure)

    def picture(self, camera: str, size: int) -> npt.NDArray[np.uint8]:
        self._paint()
        return super().picture(camera, size)

    def episode_array(self) -> npt.NDArray[np.float64]:
        own = [float(len(self.machine.cues)), *map(float, self.machine.cues), *self.machine.to_array()]
        scene = super().episode_array()
        return np.concatenate([[float(len(scene))], scene, own])

    def load_episode_array(self, array: npt.NDArray[np.float64]) -> None:
        scene, own = np.split(array[1:], [int(array[0])])
        super().load_episode_array(scene)
        cues = int(own[0])
        self.show(tuple(int(cue) for cue in own[1 : 1 + cues]))
        self.machine.load_array(own[1 + cues :])

    def details(self) -> Mapping[str, Any]:
        thing, plate = self.machine.wanted
        return {
            "cues": list(self.machine.cues),
            "wanted": f"{self.task.names[thing]} on {self.task.plates[plate]}",
            "placed": list(self.machine.pressed),
            "instruction": self.instruction,
        }

    def _arrange(self) -> bool:
        return self._apart()

    def _judge(self) -> None:
        if self._settled:
            self.machine.advance(self._placed())

    def _placed(self) -> int | None:
        """The object that lies on a plate without the hand; of a counted task, the plate."""
        gripper = self.robots[0].gripper
        for index, name in enumerate(self.task.names):
            for number, plate in enumerate(self.task.plates):
                there = self.env._eval_predicate(("on", name, plate))
                if there and not self.env.check_contact(gripper, self.env.get_object(name)):
                    return number if self.task.counted else index
        return None

    def _paint(self) -> None:
        """Lights: an object that is lit has one plain colour in place of its texture."""
        model = self._model
        model.geom_matid[:], model.geom_rgba[:] = self._own_looks
        for index in self.machine.lit:
            model.geom_matid[self._visual[index]] = -1
            model.geom_rgba[self._visual[index]] = CUE_RGBA
        model.geom_rgba[self._lamp] = LAMP_OFF_RGBA if self.machine.locked else LAMP_ON_RGBA


def with_lamp(mjcf: str) -> str:
    """The scene with a lamp at the table's front edge; it touches nothing."""
    lamp = (
        f'<geom name="{_LAMP}" type="box" size="0.015 0.06 0.012" pos="0.22 0 0.912" group="1" '
        'contype="0" conaffinity="0" rgba="0 0 0 1"/>'
    )
    return mjcf.replace("</worldbody>", f"{lamp}</worldbody>")
