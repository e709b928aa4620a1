"""DROID, `droid` (1.0.0 and later, and the sample `droid_100`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipvla.contract import Contract
from ipvla.data.source import Trajectory
from ipvla.data.standards.standard import FloatArray, Standard, concatenated

DROID_DATASETS = ("droid", "droid_100")
#: What the metadata of both call it.
DROID_INNER_NAME = "r2d2_faceblur"

_VELOCITY, _GRIPPER = "action_dict/cartesian_velocity", "action_dict/gripper_position"
_STATE = ("observation/cartesian_position", "observation/gripper_position")


@dataclass(frozen=True)
class Droid(Standard):
    """Velocity in the robot's base frame (6) and how far the gripper is open, 1 minus how far it is closed.

    State is position, roll, pitch, yaw and how far the gripper is closed (7). OpenVLA swaps the two exterior views
    by chance and drops frames in which the arm stands still; here both views have their own name, and `skip_noops`
    leaves out steps that do nothing.
    """

    @property
    def numbers(self) -> tuple[str, ...]:
        return (_VELOCITY, _GRIPPER, *_STATE)

    def action(self, trajectory: Trajectory) -> FloatArray:
        velocity, closed = trajectory.numbers(_VELOCITY), trajectory.numbers(_GRIPPER)
        columns = [velocity[:, :6], 1 - closed.reshape(len(closed), 1)]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def state(self, trajectory: Trajectory) -> FloatArray:
        return concatenated(trajectory, _STATE)

    def contract(self, state_size: int) -> Contract:
        """Velocities at 15 Hz, which no suite here takes; pictures as a camera gives them."""
        return self.real_robot(state_size, 15)


def droid(name: str) -> Droid:
    """The standard of one of `DROID_DATASETS`, or of `DROID_INNER_NAME`."""
    cameras = {
        "primary": "observation/exterior_image_1_left",
        "secondary": "observation/exterior_image_2_left",
        "wrist": "observation/wrist_image_left",
    }
    return Droid(name, cameras, gripper="open_is_one")
