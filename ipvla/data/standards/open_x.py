"""Datasets of real robots in Open X-Embodiment: BridgeData V2, RT-1's Fractal, DROID.

The conversions of recorded grippers to openings, 1 open and 0 closed ("open_is_one" of `ipvla.contract`), follow
OpenVLA's pipeline (github.com/openvla/openvla, prismatic/vla/datasets/rlds/utils/data_utils.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ipvla.contract import Contract, Pictures
from ipvla.data.source import Trajectory
from ipvla.data.standards.libero import ACTION, STATE
from ipvla.data.standards.standard import FloatArray, Standard, padded_before_gripper

#: BridgeData V2 from its own site, also packed under the second name.
BRIDGE_DATASETS = ("bridge_orig", "bridge_dataset")
FRACTAL_DATASETS = ("fractal20220817_data",)
#: DROID 1.0.0 and later, and its sample.
DROID_DATASETS = ("droid", "droid_100")
#: What the metadata of both call it.
DROID_INNER_NAME = "r2d2_faceblur"


@dataclass(frozen=True)
class RealRobot(Standard):
    """A robot that no suite here has: actions and states of its own, pictures as cameras give them."""

    control_hz: ClassVar[float]

    def contract(self, state_size: int) -> Contract:
        known = super().contract(state_size)
        return replace(
            known, pictures=Pictures("upright"), action="other", state="other", control_hz=self.control_hz
        )


@dataclass(frozen=True)
class Bridge(RealRobot):
    """Motion is what the hand really did; the gripper is 1 (open) or 0 (closed).

    The first recorded step has an empty action and is left out. Motion is the difference of the next step's pose
    (position 3, roll, pitch, yaw) and this one's, which leaves the last step without any: it is left out too.

    Attributes:
        padded_state: puts a 0 before the gripper, as OpenVLA does (8 numbers) and OpenVLA-OFT does not (7).
    """

    control_hz: ClassVar[float] = 5
    padded_state: bool = False

    @property
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (ACTION,), (STATE,)

    def action(self, trajectory: Trajectory) -> FloatArray:
        recorded, state = super().action(trajectory), super().state(trajectory)
        motion = np.diff(state[:, :6], axis=0, append=state[-1:, :6])
        opening = recorded[:, -1].copy()
        opening[1:] = binarised(recorded[1:, -1])
        return np.concatenate([motion, opening[:, None]], axis=1)

    def state(self, trajectory: Trajectory) -> FloatArray:
        state = super().state(trajectory)
        state = np.concatenate([state[:, :6], state[:, -1:]], axis=1)
        return padded_before_gripper(state) if self.padded_state else state


def bridge(name: str) -> Bridge:
    """The standard of one of `BRIDGE_DATASETS`; `image_2` and `image_3` are left out, as in OpenVLA."""
    cameras = {"primary": "observation/image_0", "secondary": "observation/image_1"}
    return Bridge(name, cameras, gripper="open_is_one", trimmed=(1, 1))


_VELOCITY, _CLOSING = "action_dict/cartesian_velocity", "action_dict/gripper_position"
_DROID_STATE = ("observation/cartesian_position", "observation/gripper_position")


@dataclass(frozen=True)
class Droid(RealRobot):
    """Velocity in the robot's base frame (6) and how far the gripper is open, 1 minus how far it is closed.

    State is position, roll, pitch, yaw and how far the gripper is closed (7). OpenVLA swaps the two exterior views
    by chance and drops frames in which the arm stands still; here both views have their own name, and `skip_noops`
    leaves out steps that do nothing.
    """

    control_hz: ClassVar[float] = 15

    @property
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (_VELOCITY, _CLOSING), _DROID_STATE

    def action(self, trajectory: Trajectory) -> FloatArray:
        velocity, closed = trajectory.numbers(_VELOCITY), trajectory.numbers(_CLOSING)
        columns = [velocity[:, :6], 1 - closed.reshape(len(closed), 1)]
        return np.concatenate(columns, axis=1).astype(np.float32)


def droid(name: str) -> Droid:
    """The standard of one of `DROID_DATASETS`, or of `DROID_INNER_NAME`."""
    cameras = {
        "primary": "observation/exterior_image_1_left",
        "secondary": "observation/exterior_image_2_left",
        "wrist": "observation/wrist_image_left",
    }
    return Droid(name, cameras, gripper="open_is_one")


_MOTION = ("action/world_vector", "action/rotation_delta")
_COMMAND = "action/gripper_closedness_action"
_FRACTAL_STATE = ("observation/base_pose_tool_reached", "observation/gripper_closed")


@dataclass(frozen=True)
class Fractal(RealRobot):
    """Commands to close and open become 1 (open) or 0 (closed); state is position, quaternion and gripper (8)."""

    control_hz: ClassVar[float] = 3

    @property
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (*_MOTION, _COMMAND), _FRACTAL_STATE

    def action(self, trajectory: Trajectory) -> FloatArray:
        commands = super().action(trajectory)
        opening = opening_from_closing(commands[:, -1])
        return np.concatenate([commands[:, :-1], opening[:, None]], axis=1)


def fractal(name: str) -> Fractal:
    """The standard of one of `FRACTAL_DATASETS`."""
    return Fractal(
        name,
        {"primary": "observation/image"},
        language="observation/natural_language_instruction",
        gripper="open_is_one",
    )


_OPEN, _CLOSED = 0.95, 0.05
_PRESSED = 0.1


def binarised(opening: FloatArray) -> FloatArray:
    """Exactly 0 or 1 from continuous openings, float32 [T] each.

    More than 0.95 is 1, less than 0.05 is 0. A value between them becomes the next of these; after the last one,
    the episode's last opening, unchanged.
    """
    certain = (opening > _OPEN) | (opening < _CLOSED)
    place = np.where(certain, np.arange(len(opening)), len(opening))
    following = np.minimum.accumulate(place[::-1])[::-1]
    reached = np.append((opening > _OPEN).astype(np.float32), opening[-1:])
    return np.asarray(reached[following], np.float32)


def opening_from_closing(closing: FloatArray) -> FloatArray:
    """1 open and 0 closed from commands, float32 [T] each: more than 0.1 closes, less than -0.1 opens.

    Before the first command the gripper is in the state that this command ends. Without any it is open.
    """
    command = np.where(closing < -_PRESSED, 1, np.where(closing > _PRESSED, 0, -1))
    given = np.nonzero(command >= 0)[0]
    before = 1 - command[given[0]] if len(given) else 1
    latest = np.maximum.accumulate(np.where(command >= 0, np.arange(len(closing)) + 1, 0))
    return np.asarray(np.concatenate([[before], command])[latest], np.float32)
