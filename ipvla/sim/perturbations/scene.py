"""What perturbations may change of a world: cameras, lights and the arm's joints."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: Arrays of a MuJoCo model, and of its headlight.
_MODEL: Final = (
    *("cam_pos", "cam_quat", "light_pos", "light_dir"),
    *("light_ambient", "light_diffuse", "light_specular", "light_castshadow", "site_group"),
)
#: What begins so are marks of robosuite's, transparent, but not for shadows.
_GRIPPER: Final = "gripper0_"
_NEVER_DRAWN: Final = 5
_HEADLIGHT: Final = ("ambient", "diffuse", "specular")


class Scene:
    """A robosuite environment's looks as its suite has them, and its arm.

    Args:
        env: a robosuite environment with one robot, as it was built.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._model_as_built = {name: getattr(self.model, name).copy() for name in _MODEL}
        self._headlight_as_built = {name: getattr(self.headlight, name).copy() for name in _HEADLIGHT}

    @property
    def model(self) -> Any:
        """MuJoCo's."""
        return self._env.sim.model._model

    @property
    def headlight(self) -> Any:
        """MuJoCo's, which shines from every camera."""
        return self.model.vis.headlight

    def restore(self) -> None:
        """Looks are as they were built; the arm stays where it is."""
        for name, value in self._model_as_built.items():
            getattr(self.model, name)[:] = value
        for name, value in self._headlight_as_built.items():
            getattr(self.headlight, name)[:] = value

    def camera(self, name: str) -> int:
        """A camera's row in the model's arrays."""
        return int(self._env.sim.model.camera_name2id(name))

    def hide_gripper_marks(self) -> None:
        """The gripper's transparent marks cast no shadows."""
        for row, name in enumerate(self._env.sim.model.site_names):
            if name.startswith(_GRIPPER):
                self.model.site_group[row] = _NEVER_DRAWN

    def move_arm(self, offset: npt.NDArray[np.float64]) -> None:
        """Adds float64 [7], in radians, to the arm's joints; the controller takes the new pose as its own."""
        robot = self._env.robots[0]
        joints = robot._ref_joint_pos_indexes
        self._env.sim.data.qpos[joints] += offset
        self._env.sim.forward()
        robot.controller.update_initial_joints(self._env.sim.data.qpos[joints])
        robot.controller.reset_goal()
