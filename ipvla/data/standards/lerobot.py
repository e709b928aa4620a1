"""LeRobot's own names of features: what a LeRobotDataset is taken for unless its standard is configured."""

from __future__ import annotations

from collections.abc import Mapping

from ipvla.data.source import Feature
from ipvla.data.standards.generic import Generic, StandardConfig

_ACTION, _STATE, _LANGUAGE = "action", "observation.state", "task"
#: One camera alone is named so in LeRobot's older datasets, `lerobot/pusht` among them.
_IMAGE, _IMAGES = "observation.image", "observation.images."


def lerobot(name: str, features: Mapping[str, Feature]) -> Generic | None:
    """The standard of a dataset with these step features, None if they are not LeRobot's.

    LeRobot does not say which of an action's dimensions is a gripper: all are normalised, as LeRobot does.
    """
    pictures = [path for path in features if path.startswith(_IMAGES) or path == _IMAGE]
    has_camera = any(features[path].is_camera for path in pictures)
    if not has_camera or not {_ACTION, _STATE, _LANGUAGE} <= set(features):
        return None
    cameras = {path.removeprefix(_IMAGES): path for path in pictures if features[path].is_camera}
    if _IMAGE in cameras:
        cameras["image"] = cameras.pop(_IMAGE)
    return StandardConfig(cameras).build(name, features)
