"""LeRobot's own names of features: what a LeRobotDataset is taken for unless its standard is configured."""

from __future__ import annotations

from collections.abc import Mapping

from ipvla.data.source import Feature
from ipvla.data.standards.generic import Generic, StandardConfig

_CAMERA = "observation.images."
_ACTION, _STATE, _LANGUAGE = "action", "observation.state", "task"


def lerobot(name: str, features: Mapping[str, Feature]) -> Generic | None:
    """The standard of a dataset with these step features, None if they are not LeRobot's.

    LeRobot does not tell which of an action's dimensions is a gripper: all are normalised, as LeRobot does.
    """
    cameras = {path.removeprefix(_CAMERA): path for path in features if path.startswith(_CAMERA)}
    if not cameras or not {_ACTION, _STATE} <= set(features):
        return None
    config = StandardConfig(cameras, (_ACTION,), (_STATE,), _LANGUAGE, gripper="none")
    return config.build(name, features)
