"""Datasets that this project wrote, and others with LIBERO's layout: everything as it was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ipvla.contract import HAND, STATE_SIZES, Contract
from ipvla.data.source import Feature, Trajectory
from ipvla.data.standards.generic import Generic, StandardConfig
from ipvla.data.standards.standard import FloatArray, Standard, concatenated

ACTION, STATE, LANGUAGE = "action", "observation/state", "language_instruction"
_OBSERVATION = "observation/"
#: LIBERO's RLDS names its two cameras `image` and `wrist_image`; other cameras keep their own name.
LIBERO_CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}


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

    Actions of another size than LIBERO's hand are another robot's: see `other_robot`.
    """
    cameras = _cameras(features)
    if not cameras or features[ACTION].shape != (HAND.action_size,):
        return None
    return Recorded(name, cameras)


def other_robot(name: str, features: Mapping[str, Feature]) -> Generic | None:
    """The standard of a dataset with LIBERO's names and actions of another size, None if it has not these names.

    Nothing tells which of its action dimensions is a gripper: all are normalised, and none is clipped.
    """
    cameras = _cameras(features)
    config = StandardConfig(cameras, (ACTION,), (STATE,), LANGUAGE, gripper="none") if cameras else None
    return None if config is None else config.build(name, features)


def _cameras(features: Mapping[str, Feature]) -> dict[str, str]:
    """Camera -> step feature; none unless the other features have LIBERO's names and kinds."""
    needed = {ACTION: "number", STATE: "number", LANGUAGE: "text"}
    kinds = {path: feature.kind for path, feature in features.items()}
    if any(kinds.get(path) != kind for path, kind in needed.items()):
        return {}
    keys = [path.removeprefix(_OBSERVATION) for path in kinds if path.startswith(_OBSERVATION)]
    return {LIBERO_CAMERAS.get(k, k): _OBSERVATION + k for k in keys if kinds[_OBSERVATION + k] == "image"}
