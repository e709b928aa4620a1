"""LIBERO's suites as OpenVLA published them: replayed without no-ops, pictures rotated by 180 degrees.

Rotated pictures are upright and mirrored: left and right are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ipvla.contract import HAND, Contract, Pictures, State
from ipvla.data.gripper import opening_from_environment
from ipvla.data.rlds.format import LIBERO_CAMERAS
from ipvla.data.source import Trajectory
from ipvla.data.standards.recorded import ACTION, STATE
from ipvla.data.standards.standard import FloatArray, Standard, concatenated, padded_before_gripper

#: Four suites and LIBERO-90; `libero_lm_90` is the latter with ECoT's reasoning, as MiniVLA names it.
LIBERO_DATASETS = (
    "libero_spatial_no_noops",
    "libero_object_no_noops",
    "libero_goal_no_noops",
    "libero_10_no_noops",
    "libero_90_no_noops",
    "libero_lm_90",
)
#: The names of the first four in their metadata (`liber_o10` is spelt so there).
LIBERO_INNER_NAMES = ("libero_spatial", "libero_object", "libero_goal", "liber_o10")
#: OpenVLA's replay recorded it; datasets that only have a suite's name lack it.
JOINTS = "observation/joint_state"


@dataclass(frozen=True)
class Libero(Standard):
    """The gripper becomes 1 (open) or 0 (closed), as OpenVLA has it.

    State is the hand's position (3) and axis-angle (3) and its two fingers: 8 numbers, as in OpenVLA-OFT and as
    simulators give it.

    Attributes:
        padded_state: puts a 0 before the fingers, as OpenVLA does: statistics of the two are not interchangeable.
    """

    padded_state: bool = False

    @property
    def numbers(self) -> tuple[str, ...]:
        return (ACTION, STATE)

    def action(self, trajectory: Trajectory) -> FloatArray:
        action = concatenated(trajectory, (ACTION,))
        return np.concatenate([action[:, :6], opening_from_environment(action[:, -1:])], axis=1)

    def state(self, trajectory: Trajectory) -> FloatArray:
        state = concatenated(trajectory, (STATE,))
        return padded_before_gripper(state) if self.padded_state else state

    def contract(self, state_size: int) -> Contract:
        """LIBERO's hand at 20 Hz; the pictures were rotated by 180 degrees, so left and right are exchanged."""
        state: State = "hand_padded" if self.padded_state else "hand"
        return replace(
            HAND,
            cameras=tuple(sorted(self.cameras)),
            pictures=Pictures("mirrored"),
            gripper=self.gripper,
            state=state,
            state_size=state_size,
        )


def libero(name: str) -> Libero:
    """The standard of one of `LIBERO_DATASETS` or `LIBERO_INNER_NAMES`."""
    cameras = {camera: f"observation/{key}" for key, camera in LIBERO_CAMERAS.items()}
    return Libero(name, cameras, gripper="open_is_one")
