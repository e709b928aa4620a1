"""BridgeData V2 from its own site, `bridge_orig` (also packed as `bridge_dataset`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipvla.contract import Contract
from ipvla.data.gripper import binarised
from ipvla.data.source import Trajectory
from ipvla.data.standards.recorded import ACTION, STATE
from ipvla.data.standards.standard import FloatArray, Standard, concatenated, padded_before_gripper

BRIDGE_DATASETS = ("bridge_orig", "bridge_dataset")


@dataclass(frozen=True)
class Bridge(Standard):
    """Motion is what the hand really did; the gripper is 1 (open) or 0 (closed).

    The first recorded step has an empty action and is left out. Motion is the difference of the next step's pose
    (position 3, roll, pitch, yaw) and this one's, which leaves the last step without any: it is left out too.

    Attributes:
        padded_state: puts a 0 before the gripper, as OpenVLA does (8 numbers) and OpenVLA-OFT does not (7).
    """

    padded_state: bool = False

    @property
    def numbers(self) -> tuple[str, ...]:
        return (ACTION, STATE)

    def action(self, trajectory: Trajectory) -> FloatArray:
        recorded, state = concatenated(trajectory, (ACTION,)), concatenated(trajectory, (STATE,))
        motion = np.diff(state[:, :6], axis=0, append=state[-1:, :6])
        opening = recorded[:, -1].copy()
        opening[1:] = binarised(recorded[1:, -1])
        return np.concatenate([motion, opening[:, None]], axis=1)

    def state(self, trajectory: Trajectory) -> FloatArray:
        state = concatenated(trajectory, (STATE,))
        state = np.concatenate([state[:, :6], state[:, -1:]], axis=1)
        return padded_before_gripper(state) if self.padded_state else state

    def contract(self, state_size: int) -> Contract:
        """Poses in metres and radians at 5 Hz, which no suite here takes; pictures as a camera gives them."""
        return self.real_robot(state_size, 5)


def bridge(name: str) -> Bridge:
    """The standard of one of `BRIDGE_DATASETS`; `image_2` and `image_3` are left out, as in OpenVLA."""
    cameras = {"primary": "observation/image_0", "secondary": "observation/image_1"}
    return Bridge(name, cameras, gripper="open_is_one", trimmed=(1, 1))
