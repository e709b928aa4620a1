"""Geometry of a camera's pictures in messages: three keys of ours beside its picture's.

`KEY_depth` is float32 [H, W] in metres along the camera's axis, 0 where unknown, its rows and columns those of the
upright picture however the picture itself is turned; `KEY_intrinsics` [3, 3] is in its pixels, and `KEY_pose`
[4, 4] goes from the camera (x right, y down, z forward) to the world.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ipvla.contract import Orientation
from ipvla.geometry import CameraGeometry

#: Pixels. A resampling filter costs what a picture's side is long, whatever its area.
LONGEST_SIDE: Final = 4096
_SHAPES: Final = {"depth": "[H, W]", "intrinsics": "[3, 3]", "pose": "[4, 4]"}


def geometry_keys(picture: str) -> dict[str, dict[str, Any]]:
    """The keys beside that of a picture, and what our server's metadata say of each."""
    about = {
        "depth": "metres along the camera's axis, 0 where unknown; rows and columns of the upright picture",
        "intrinsics": "in pixels of the depth",
        "pose": "camera (x right, y down, z forward) to world, metres",
    }
    return {
        f"{picture}_{name}": {"dtype": "float32", "shape": shape, "about": about[name]}
        for name, shape in _SHAPES.items()
    }


def geometry_message(picture: str, seen: CameraGeometry) -> dict[str, Any]:
    """The values of these keys."""
    return {key: getattr(seen, key.rpartition("_")[2]).astype(np.float32) for key in geometry_keys(picture)}


def geometry_of(picture: str, message: Mapping[Any, Any], orientation: Orientation) -> CameraGeometry:
    """The geometry in a message that has these keys.

    Args:
        orientation: of the picture.

    Raises:
        ValueError: a value has another type or shape, or numbers that no camera has.
    """
    values = {}
    for name, shape in _SHAPES.items():
        key, value = f"{picture}_{name}", message[f"{picture}_{name}"]
        wanted = {"intrinsics": (3, 3), "pose": (4, 4)}.get(name)
        if not isinstance(value, np.ndarray) or value.ndim != 2 or wanted not in (None, value.shape):
            raise ValueError(f"{key} is no array {shape}; send float32 {shape}")
        if not value.size or max(value.shape) > LONGEST_SIDE:
            raise ValueError(f"{key} is {list(value.shape)}; send 1 to {LONGEST_SIDE} pixels a side")
        if value.dtype.kind not in "iuf" or not np.isfinite(value).all():
            raise ValueError(f"{key} has values that are no finite numbers; send 0 where depth is unknown")
        values[name] = value
    if (values["depth"] < 0).any() or min(values["intrinsics"][0, 0], values["intrinsics"][1, 1]) <= 0:
        raise ValueError(f"{picture}_depth or the focal lengths of {picture}_intrinsics are negative; send metres")
    intrinsics, pose = (values[name].astype(np.float64) for name in ("intrinsics", "pose"))
    return CameraGeometry(values["depth"].astype(np.float32), intrinsics, pose, orientation)
