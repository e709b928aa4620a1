"""Any other dataset: its configuration names the features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ipvla.contract import GRIPPERS, HAND, ORIENTATIONS, Contract, Gripper, Orientation, Pictures
from ipvla.data.source import DatasetError, Feature
from ipvla.data.standards.standard import Standard


@dataclass(frozen=True)
class Generic(Standard):
    """Features side by side, as they were recorded.

    Attributes:
        action_paths, state_paths: step features of numbers, in the order in which they are put side by side.
        orientation, control_hz: of the contract; episodes do not depend on them.
    """

    action_paths: tuple[str, ...] = ()
    state_paths: tuple[str, ...] = ()
    orientation: Orientation = "unknown"
    control_hz: float | None = None

    @property
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.action_paths, self.state_paths

    def contract(self, state_size: int) -> Contract:
        """What the configuration says; motions of a hand with a gripper are clipped as LIBERO's are."""
        joints = all(self.absolute[:-1])
        known = super().contract(state_size)
        return replace(
            known,
            pictures=Pictures(self.orientation),
            action="joints" if joints else "unknown",
            clipped=not joints and self.gripper != "none" and known.action_size == HAND.action_size,
            control_hz=self.control_hz,
        )

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in super().settings().items() if k not in ("orientation", "control_hz")}


@dataclass(frozen=True)
class _Names:
    """What a format calls its features, and what its last action dimension is."""

    camera: tuple[str, ...]
    action: tuple[str, ...]
    state: tuple[str, ...]
    language: str
    gripper: Gripper


_LEROBOT = _Names(
    ("observation.images.", "observation."), ("action",), ("observation.state",), "task", gripper="none"
)
_RLDS = _Names(
    ("observation/",), ("action",), ("observation/state",), "language_instruction", gripper="environment"
)


@dataclass(frozen=True)
class StandardConfig:
    """How a dataset that is not known by name becomes robot episodes. What is None is as its format has it.

    Attributes:
        cameras: name of each view -> step feature, for example {"agentview": "observation/image"}; None for all
            pictures by the last part of their names.
        action: step features of numbers that make up an action, side by side; None for `action`.
        state: step features of numbers that make up proprioception, side by side; None for `observation/state`,
            in LeRobot `observation.state`.
        language: the step feature, or the metadata, that holds the task in words; None for `language_instruction`,
            in LeRobot `task`.
        gripper: how the last action dimension encodes the gripper: `environment` (-1 open, +1 closed),
            `open_is_one` (0 closed, 1 open), or `none` for actions that end in no gripper; None for `environment`,
            in LeRobot `none`.
        absolute: the whole action is a position (of joints), not a motion.
        trimmed: how many steps to leave out at an episode's start and at its end.
        skip_noops: leave out steps that do nothing.
        orientation: how pictures are turned: `upright`, `mirrored` as in LIBERO's published datasets, or
            `upside_down`.
        control_hz: control steps per second; null for what the dataset says.
    """

    cameras: dict[str, str] | None = None
    action: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None
    language: str | None = None
    gripper: Gripper | None = None
    absolute: bool = False
    trimmed: tuple[int, int] = (0, 0)
    skip_noops: bool = False
    orientation: Orientation = "unknown"
    control_hz: float | None = None

    def __post_init__(self) -> None:
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"orientation is {self.orientation!r}; choose one of {', '.join(ORIENTATIONS)}")
        if self.control_hz is not None and self.control_hz <= 0:
            raise ValueError(f"control_hz is {self.control_hz}; give control steps per second, above 0")
        if self.cameras is not None and not self.cameras:
            raise ValueError("cameras is empty; name at least one, e.g. {agentview: observation/image}")
        for name in ("action", "state"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty; name the step features that make it up")
        if self.gripper is not None and self.gripper not in GRIPPERS:
            raise ValueError(f"gripper is {self.gripper!r}; choose one of {', '.join(GRIPPERS)}")
        if min(self.trimmed) < 0:
            raise ValueError(f"trimmed is {self.trimmed}; give two numbers of steps, 0 or more")
        if self.skip_noops and (self.absolute or self.gripper == "none"):
            raise ValueError("skip_noops wants motions and a gripper; set it to false for other actions")

    def build(self, name: str, features: Mapping[str, Feature]) -> Generic:
        """The standard of dataset `name`. DatasetError if a feature is missing or of the wrong kind."""
        names = _names(features)
        cameras = _cameras(features, names) if self.cameras is None else self.cameras
        action, state = self.action or names.action, self.state or names.state
        gripper = self.gripper or names.gripper
        if self.skip_noops and gripper == "none":
            raise DatasetError(
                f"{name}: skip_noops wants motions and a gripper, and gripper is none; set it to false"
            )
        _require(name, features, dict.fromkeys((*action, *state), "number"))
        _require(name, features, dict.fromkeys(cameras.values(), "image"))
        if not cameras:
            raise DatasetError(f"{name} has no pictures; it has {', '.join(sorted(features))}")
        dim = sum(math.prod(features[path].shape) for path in action)
        hand = dim if gripper == "none" else dim - 1
        return Generic(
            name,
            cameras,
            self.language or names.language,
            normalised=(True,) * hand + (False,) * (dim - hand),
            absolute=(self.absolute,) * hand + (True,) * (dim - hand),
            gripper=gripper,
            trimmed=self.trimmed,
            skip_noops=self.skip_noops,
            action_paths=action,
            state_paths=state,
            orientation=self.orientation,
            control_hz=self.control_hz,
        )


def flags(features: Mapping[str, Feature]) -> str:
    """The settings that would configure a standard for these features: a guess to begin with."""
    names = _names(features)
    cameras = _cameras(features, names) or {"NAME": "FEATURE"}
    numbers = [path for path, feature in features.items() if feature.kind == "number" and feature.shape]
    texts = [path for path, feature in features.items() if feature.kind == "text"]
    action = _likeliest(numbers, (*names.action, "action"))
    state = _likeliest([path for path in numbers if path != action], (*names.state, "state", "proprio", "joint"))
    language = _likeliest(texts, (names.language, "instruction", "language", "task"))
    views = ", ".join(f"{camera}: {path}" for camera, path in cameras.items())
    unseen = "" if state else ' --data.proprio "[]"'
    return (
        f'--data.standard.cameras "{{{views}}}" --data.standard.action "[{action or "FEATURE"}]" '
        f'--data.standard.state "[{state or action or "FEATURE"}]" --data.standard.language '
        f"{language or names.language} --data.standard.gripper none{unseen}"
    )


def _likeliest(paths: Sequence[str], words: Sequence[str]) -> str:
    for word in words:
        for path in paths:
            if path == word or word in path.lower():
                return path
    return ""


def _names(features: Mapping[str, Feature]) -> _Names:
    lerobot = any(path.startswith("observation.") for path in features) or {"task", "frame_index"} <= set(features)
    return _LEROBOT if lerobot else _RLDS


def _cameras(features: Mapping[str, Feature], names: _Names) -> dict[str, str]:
    cameras = {}
    for path, feature in features.items():
        if feature.is_camera:
            prefix = next((prefix for prefix in names.camera if path.startswith(prefix)), "")
            cameras[path.removeprefix(prefix).replace("/", "_")] = path
    return cameras


def _require(name: str, features: Mapping[str, Feature], kinds: Mapping[str, str]) -> None:
    for path, kind in kinds.items():
        if path not in features:
            remedy = '; where none was recorded: --data.standard.state "[action]" --data.proprio "[]"'
            raise DatasetError(
                f"{name} has no step feature {path!r}; it has {', '.join(sorted(features))}"
                f"{remedy if path in (*_RLDS.state, *_LEROBOT.state) else ''}"
            )
        feature = features[path]
        if feature.kind != kind:
            raise DatasetError(f"{name}: step feature {path!r} is of kind {feature.kind}, not {kind}")
        if feature.is_depth:
            raise DatasetError(
                f"{name}: step feature {path!r} holds depth ({feature.dtype}), which is no camera's picture; "
                "leave it out of the cameras"
            )


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
