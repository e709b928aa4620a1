"""Any other dataset, told by its configuration which features are what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ipvla.contract import GRIPPERS, HAND, ORIENTATIONS, Contract, Gripper, Orientation, Pictures
from ipvla.data.source import DatasetError, Feature, Trajectory
from ipvla.data.standards.standard import FloatArray, Standard, concatenated


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
    def numbers(self) -> tuple[str, ...]:
        return (*self.action_paths, *self.state_paths)

    def action(self, trajectory: Trajectory) -> FloatArray:
        return concatenated(trajectory, self.action_paths)

    def state(self, trajectory: Trajectory) -> FloatArray:
        return concatenated(trajectory, self.state_paths)

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
class StandardConfig:
    """How a dataset that is not known by name becomes robot episodes.

    Attributes:
        cameras: name of each view -> step feature, for example {"agentview": "observation/image"}.
        action: step features of numbers that make up an action, side by side.
        state: step features of numbers that make up proprioception, side by side.
        language: the step feature, or the metadata, that holds the task in words.
        gripper: how the last action dimension tells the gripper: `environment` (-1 open, +1 closed),
            `open_is_one` (0 closed, 1 open), or `none` for actions that end in no gripper.
        absolute: the whole action tells where to be (joint positions), not how to move.
        trimmed: how many steps to leave out at an episode's start and at its end.
        skip_noops: leave out steps that do nothing.
        orientation: how pictures are turned: `upright`, `mirrored` as in LIBERO's published datasets, or
            `upside_down`.
        control_hz: control steps per second; null for what the dataset says.
    """

    cameras: dict[str, str] = field(default_factory=dict)
    action: tuple[str, ...] = ("action",)
    state: tuple[str, ...] = ("observation/state",)
    language: str = "language_instruction"
    gripper: Gripper = "environment"
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
        if not self.cameras:
            raise ValueError("cameras is empty; name at least one, e.g. {agentview: observation/image}")
        for name in ("action", "state"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name the step features that make it up")
        if self.gripper not in GRIPPERS:
            raise ValueError(f"gripper is {self.gripper!r}; choose one of {', '.join(GRIPPERS)}")
        if min(self.trimmed) < 0:
            raise ValueError(f"trimmed is {self.trimmed}; give two numbers of steps, 0 or more")
        if self.skip_noops and (self.absolute or self.gripper == "none"):
            raise ValueError("skip_noops wants motions and a gripper; set it to false for other actions")

    def build(self, name: str, features: Mapping[str, Feature]) -> Generic:
        """The standard of dataset `name`. DatasetError if a feature is missing or of the wrong kind."""
        kinds = dict.fromkeys((*self.action, *self.state), "number") | dict.fromkeys(
            self.cameras.values(), "image"
        )
        for path, kind in kinds.items():
            if path not in features:
                raise DatasetError(f"{name} has no step feature {path!r}; it has {', '.join(sorted(features))}")
            if features[path].kind != kind:
                raise DatasetError(f"{name}: step feature {path!r} is of kind {features[path].kind}, not {kind}")
        dim = sum(_width(features[path]) for path in self.action)
        hand = dim if self.gripper == "none" else dim - 1
        return Generic(
            name,
            self.cameras,
            self.language,
            normalised=(True,) * hand + (False,) * (dim - hand),
            absolute=(self.absolute,) * hand + (True,) * (dim - hand),
            gripper=self.gripper,
            trimmed=self.trimmed,
            skip_noops=self.skip_noops,
            action_paths=self.action,
            state_paths=self.state,
            orientation=self.orientation,
            control_hz=self.control_hz,
        )


def _width(feature: Feature) -> int:
    return math.prod(feature.shape)
