"""RT-1's robot data, `fractal20220817_data`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipvla.contract import Contract
from ipvla.data.gripper import opening_from_closing
from ipvla.data.source import Trajectory
from ipvla.data.standards.standard import FloatArray, Standard, concatenated

FRACTAL_DATASETS = ("fractal20220817_data",)

_MOTION = ("action/world_vector", "action/rotation_delta")
_GRIPPER = "action/gripper_closedness_action"
_STATE = ("observation/base_pose_tool_reached", "observation/gripper_closed")


@dataclass(frozen=True)
class Fractal(Standard):
    """Commands to close and open become 1 (open) or 0 (closed); state is position, quaternion and gripper (8)."""

    @property
    def numbers(self) -> tuple[str, ...]:
        return (*_MOTION, _GRIPPER, *_STATE)

    def action(self, trajectory: Trajectory) -> FloatArray:
        closing = concatenated(trajectory, (_GRIPPER,))[:, 0]
        return np.concatenate([concatenated(trajectory, _MOTION), opening_from_closing(closing)[:, None]], axis=1)

    def state(self, trajectory: Trajectory) -> FloatArray:
        return concatenated(trajectory, _STATE)

    def contract(self, state_size: int) -> Contract:
        """Motion in metres and radians at 3 Hz, which no suite here takes; pictures as a camera gives them."""
        return self.real_robot(state_size, 3)


def fractal(name: str) -> Fractal:
    """The standard of one of `FRACTAL_DATASETS`."""
    return Fractal(
        name,
        {"primary": "observation/image"},
        language="observation/natural_language_instruction",
        gripper="open_is_one",
    )
