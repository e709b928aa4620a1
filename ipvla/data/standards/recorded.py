"""Datasets that this project wrote, and others with LIBERO's layout: everything as it was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ipvla.contract import HAND, STATE_SIZES, Contract
from ipvla.data.rlds.format import LIBERO_CAMERAS
from ipvla.data.source import Feature, Trajectory
from ipvla.data.standards.standard import FloatArray, Standard, concatenated

ACTION, STATE, LANGUAGE = "action", "observation/state", "language_instruction"
_OBSERVATION = "observation/"


@dataclass(frozen=True)
class Recorded(Standard):
    """Actions and states as they are: actions in the environment's units, the gripper -1 (open) or +1 (closed)."""

    @property
    def numbers(self) -> tuple[str, ...]:
        return (ACTION, STATE)

    def action(self, trajectory: Trajectory) -> FloatArray:
        return concatenated(trajectory, (ACTION,))

    def state(self, trajectory: Trajectory) -> FloatArray:
        return concatenated(trajectory, (STATE,))

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
