"""LIBERO's layout: datasets that this project wrote, as recorded, and LIBERO's suites as OpenVLA published them.

OpenVLA replayed them without no-ops and rotated the pictures by 180 degrees, which makes them upright and
mirrored: left and right are exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ipvla.contract import HAND, STATE_SIZES, Contract, Pictures, State
from ipvla.data.rlds.format import LIBERO_CAMERAS
from ipvla.data.source import Feature, Trajectory
from ipvla.data.standards.standard import FloatArray, Standard, padded_before_gripper

ACTION, STATE, LANGUAGE = "action", "observation/state", "language_instruction"
_OBSERVATION = "observation/"


@dataclass(frozen=True)
class Recorded(Standard):
    """Actions and states as they are: actions in the environment's units, the gripper -1 (open) or +1 (closed)."""

    @property
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (ACTION,), (STATE,)

    def contract(self, state_size: int) -> Contract:
        """Motion of LIBERO's hand; how pictures are turned, and the control rate, are for `Recording` to say."""
        return replace(
            super().contract(state_size),
            action="hand",
            clipped=True,
            state="hand" if state_size == STATE_SIZES["hand"] else "unknown",
        )


def recorded(name: str, features: Mapping[str, Feature]) -> Recorded | None:
    """The standard of a dataset with these step features, None if they are not LIBERO's.

    Actions are LIBERO's if they are of 7 numbers, six of the hand's motion and the gripper: 14 joints under
    LIBERO's names would be clipped to [-1, 1], and the last one made a gripper.
    """
    needed = {ACTION: "number", STATE: "number", LANGUAGE: "text"}
    kinds = {path: feature.kind for path, feature in features.items()}
    keys = [path.removeprefix(_OBSERVATION) for path in kinds if path.startswith(_OBSERVATION)]
    cameras = {LIBERO_CAMERAS.get(k, k): _OBSERVATION + k for k in keys if features[_OBSERVATION + k].is_camera}
    if any(kinds.get(path) != kind for path, kind in needed.items()) or not cameras:
        return None
    if features[ACTION].shape != (HAND.action_size,):
        return None
    return Recorded(name, cameras)


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
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (ACTION,), (STATE,)

    def action(self, trajectory: Trajectory) -> FloatArray:
        action = super().action(trajectory)
        return np.concatenate([action[:, :6], 1 - action[:, -1:].clip(0, 1)], axis=1)

    def state(self, trajectory: Trajectory) -> FloatArray:
        state = super().state(trajectory)
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
