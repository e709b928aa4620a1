"""Geometry of pictures in a dataset: the names of its step features, and one camera's points at one step.

Beside a camera's pictures stand depth in 16 bits (`_depth`, PNG of one channel, upright), fx, fy, cx and cy in
pixels (`_intrinsics`, [4]) and the pose from camera to world, row by row (`_pose`, [16]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from ipvla.contract import Orientation
from ipvla.data.pictures import EncodedPictures, encode_depth
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory
from ipvla.geometry import CameraGeometry, RecordedGeometry, pinhole, unpacked

#: Where LeRobot has its pictures, and where a conversion puts numbers.
_LEROBOT_PICTURES, _LEROBOT_NUMBERS = "observation.images.", "observation."
_NOWHERE: Final = np.eye(4)


@dataclass(frozen=True)
class GeometryConfig:
    """Where the points of a policy with `model.fusion` come from.

    Attributes:
        fallback_fov_deg: where a dataset has depth, but intrinsics or poses of no camera: the angle of view, from
            left to right, of the camera that is assumed, which stands at the origin.
        accept_fallback: train on the points of such a camera, whose metres are a guess.
    """

    fallback_fov_deg: float = 60.0
    accept_fallback: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.fallback_fov_deg <= 170:
            raise ValueError(
                f"data.geometry.fallback_fov_deg is {self.fallback_fov_deg}; give degrees from 1 to 170"
            )

    def terms(self, dataset: str, no_depth: Sequence[str], no_pose: Sequence[str]) -> PointTerms:
        """How points are made of a dataset's depth.

        Args:
            dataset: its location.
            no_depth: cameras of which it has no depth.
            no_pose: cameras of which it has no intrinsics or no pose.

        Raises:
            DatasetError: there is no depth, or points would be a guess that nobody asked for.
        """
        if no_depth:
            raise DatasetError(
                f"model.fusion reads depth, and {dataset} has none of {', '.join(no_depth)}; collect it with "
                "--showing.geometry true, or set --model.fusion.type none"
            )
        if no_pose and not self.accept_fallback:
            raise DatasetError(
                f"{dataset} has no intrinsics or no pose of {', '.join(no_pose)}: its fallback is a camera of "
                f"{self.fallback_fov_deg:g} degrees at the origin, whose metres are a guess; set "
                "--data.geometry.accept_fallback true to train on that"
            )
        return PointTerms(self.fallback_fov_deg if no_pose else None)


@dataclass(frozen=True)
class PointTerms:
    """How points are made of depth, in training and in rollout alike.

    Attributes:
        fallback_fov_deg: of a camera at the origin that takes every camera's place; None for intrinsics and poses
            as they are recorded.
    """

    fallback_fov_deg: float | None = None

    def applied(self, seen: CameraGeometry) -> CameraGeometry:
        """The geometry of which points are made."""
        if self.fallback_fov_deg is None:
            return seen
        height, width = seen.depth.shape
        intrinsics = pinhole(self.fallback_fov_deg, height, width, vertical=False)
        return replace(seen, intrinsics=intrinsics, pose=_NOWHERE)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        if self.fallback_fov_deg is None:
            return {"intrinsics": "recorded"}
        return {"intrinsics": "fallback", "fallback_fov_deg": self.fallback_fov_deg}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(None if values["intrinsics"] == "recorded" else float(values["fallback_fov_deg"]))


@dataclass(frozen=True)
class EncodedGeometry:
    """One camera's geometry in a recorded episode of T steps.

    Attributes:
        depth: T pictures of 16 bits.
        intrinsics: float32 [T, 4]; None if not recorded.
        pose: float32 [T, 16]; None if not recorded.
    """

    depth: EncodedPictures
    intrinsics: npt.NDArray[np.float32] | None
    pose: npt.NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        return self.depth.nbytes + sum(x.nbytes for x in (self.intrinsics, self.pose) if x is not None)

    @property
    def complete(self) -> bool:
        """Are intrinsics and poses recorded?"""
        return self.intrinsics is not None and self.pose is not None

    @classmethod
    def of(cls, trajectory: Trajectory, pictures: str) -> EncodedGeometry | None:
        """That of the camera with these pictures; None if no depth was recorded. DatasetError if it is damaged."""
        depth, intrinsics, pose = geometry_paths(pictures)
        if depth not in trajectory.steps:
            return None
        encoded = trajectory.pictures(depth)
        if not isinstance(encoded, EncodedPictures):
            raise DatasetError(f"{trajectory.where}: depth {depth!r} is a video, which has 8 bits; keep images")
        numbers = [
            trajectory.numbers(path).astype(np.float32).reshape(len(trajectory), -1)
            if path in trajectory.steps
            else None
            for path in (intrinsics, pose)
        ]
        return cls(encoded, *numbers)

    def at(self, step: int, unit_m: float, orientation: Orientation, terms: PointTerms) -> CameraGeometry:
        """At recorded step `step`, as `terms` have it. ValueError if depth cannot be decoded.

        Args:
            unit_m: metres per unit of depth.
            orientation: of the camera's pictures.
        """
        depth = unpacked(self.depth.depth(step), unit_m)
        intrinsics, pose = np.eye(3), _NOWHERE
        if self.intrinsics is not None and self.pose is not None:
            fx, fy, cx, cy = self.intrinsics[step].astype(np.float64).tolist()
            intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
            pose = self.pose[step].astype(np.float64).reshape(4, 4)
        elif terms.fallback_fov_deg is None:
            raise ValueError("depth has no intrinsics or no pose; set data.geometry.accept_fallback to guess them")
        return terms.applied(CameraGeometry(depth, intrinsics, pose, orientation))


def geometry_paths(pictures: str) -> tuple[str, str, str]:
    """The step features with depth, intrinsics and pose of the camera whose pictures are this feature."""
    numbers = pictures
    if pictures.startswith(_LEROBOT_PICTURES):
        numbers = _LEROBOT_NUMBERS + pictures.removeprefix(_LEROBOT_PICTURES)
    return f"{pictures}_depth", f"{numbers}_intrinsics", f"{numbers}_pose"


def geometry_features(pictures: str, recorded: RecordedGeometry) -> dict[str, Feature]:
    """The step features of a camera's geometry."""
    depth, intrinsics, pose = geometry_paths(pictures)
    return {
        depth: Feature("image", (*recorded.depth.shape[1:], 1), "uint16"),
        intrinsics: Feature("number", (4,)),
        pose: Feature("number", (16,)),
    }


def geometry_steps(pictures: str, recorded: RecordedGeometry) -> dict[str, Steps]:
    """Their values; a depth that repeats the one before it is not encoded again."""
    depth, intrinsics, pose = geometry_paths(pictures)
    files: list[bytes] = []
    for t, each in enumerate(recorded.depth):
        again = t > 0 and np.array_equal(each, recorded.depth[t - 1])
        files.append(files[-1] if again else encode_depth(each))
    k = recorded.intrinsics
    return {
        depth: EncodedPictures(files),
        intrinsics: np.stack([k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]], 1).astype(np.float32),
        pose: recorded.pose.reshape(-1, 16).astype(np.float32),
    }
