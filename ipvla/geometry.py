"""Where the pixels of a picture are: depth, intrinsics and pose of a pinhole camera, and the points they make.

A camera's axes are x right, y down and z forward. Pixels are counted from the upper left corner of the upright
picture, and the pixel in row r and column c has its centre at (c + 0.5, r + 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from ipvla.contract import Orientation, Pictures

Floats = npt.NDArray[np.floating[Any]]

#: Metres per unit of a depth that is recorded in 16 bits: 0.1 mm, up to 6.5 m.
DEPTH_UNIT_M: Final = 1e-4
_DEEPEST: Final = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class CameraGeometry:
    """What one camera knows of where its pixels are.

    Attributes:
        depth: float32 [H, W], metres along the camera's z axis of what each pixel's centre shows, rows and columns
            as in the upright picture; 0 where it is unknown.
        intrinsics: float64 [3, 3], [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of this H x W; never mirrored.
        pose: float64 [4, 4], from the camera's axes to the world's, in metres.
        orientation: of the picture that it belongs to: `points` are turned as that is.

    Raises:
        ValueError: a shape is another one.
    """

    depth: npt.NDArray[np.float32]
    intrinsics: Floats
    pose: Floats
    orientation: Orientation = "upright"

    def __post_init__(self) -> None:
        shapes = {"intrinsics": (3, 3), "pose": (4, 4)}
        wrong = [f"{n} is {getattr(self, n).shape}" for n, s in shapes.items() if getattr(self, n).shape != s]
        if self.depth.ndim != 2 or wrong:
            raise ValueError(
                f"a camera's geometry is a depth [H, W], intrinsics [3, 3] and a pose [4, 4]; depth is "
                f"{self.depth.shape}{''.join(f', {one}' for one in wrong)}"
            )

    def points(self, side: int | None = None) -> npt.NDArray[np.float32]:
        """The point map in world coordinates, float32 [H, W, 3] in metres, NaN where it is unknown.

        Args:
            side: of a grid of patches; the map is then [side, side, 3], what each patch's middle pixel shows.

        Raises:
            ValueError: nothing tells how the picture is turned.
        """
        height, width = self.depth.shape
        rows, columns = (_middles(pixels, side or pixels) for pixels in (height, width))
        if self.orientation == "mirrored":
            columns = width - 1 - columns
        elif self.orientation == "upside_down":
            rows = height - 1 - rows
        elif self.orientation != "upright":
            raise ValueError(
                f"pictures are turned {self.orientation!r}, so nothing tells which pixel a depth belongs to; "
                "write their orientation into the dataset's recording.json"
            )
        depth = self.depth[np.ix_(rows, columns)].astype(np.float64)[..., None]
        pixels = np.stack(np.broadcast_arrays(columns[None] + 0.5, rows[:, None] + 0.5, 1.0), -1)
        seen = pixels @ np.linalg.inv(self.intrinsics).T * depth
        world = seen @ self.pose[:3, :3].T + self.pose[:3, 3]
        return np.where(depth > 0, world, np.nan).astype(np.float32)

    def shown(self, pictures: Pictures) -> Self:
        """That of the picture after it was resized, cropped and turned so.

        Depth has that of the nearest pixel, so a point lies up to half a pixel beside its pixel's ray.
        """
        height, width = self.depth.shape
        new = (height, width) if pictures.size is None else (pictures.size, pictures.size)
        share, intrinsics = pictures.crop_area**0.5, np.array(self.intrinsics, np.float64)
        rows, columns = (
            np.floor((0.5 + share * ((np.arange(n) + 0.5) / n - 0.5)) * old).astype(np.int64)
            for n, old in zip(new, (height, width), strict=True)
        )
        for axis, (n, old) in enumerate(zip(new[::-1], (width, height), strict=True)):
            intrinsics[axis] *= n / (old * share)
            intrinsics[axis, 2] += n * 0.5 * (1 - 1 / share)
        same = new == (height, width) and share == 1
        return replace(
            self,
            depth=self.depth if same else self.depth[np.ix_(rows, columns)],
            intrinsics=intrinsics,
            orientation=pictures.orientation,
        )


def pinhole(fov_deg: float, height: int, width: int, vertical: bool = True) -> npt.NDArray[np.float64]:
    """Intrinsics [3, 3] of a camera with square pixels that looks through the picture's middle.

    Args:
        fov_deg: angle of view from the upper to the lower side, or from left to right if not `vertical`.
    """
    focal = 0.5 * (height if vertical else width) / np.tan(np.radians(fov_deg) / 2)
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class RecordedGeometry:
    """One camera's geometry over an episode's T control steps, as it is recorded.

    Attributes:
        depth: uint16 [T, H, W], in units of `unit_m`, upright, 0 where it is unknown or beyond 65535 units.
        intrinsics: float32 [T, 3, 3], in pixels.
        pose: float32 [T, 4, 4], camera to world, in metres.
        unit_m: metres per unit of depth.
    """

    depth: npt.NDArray[np.uint16]
    intrinsics: npt.NDArray[np.float32]
    pose: npt.NDArray[np.float32]
    unit_m: float = DEPTH_UNIT_M

    def __post_init__(self) -> None:
        steps, shapes = len(self.depth), (self.intrinsics.shape, self.pose.shape)
        if self.depth.ndim != 3 or shapes != ((steps, 3, 3), (steps, 4, 4)):
            raise ValueError(
                f"depth is {self.depth.shape}, intrinsics and pose are {shapes[0]} and {shapes[1]}; record [T, H, "
                "W], [T, 3, 3] and [T, 4, 4]"
            )

    def __len__(self) -> int:
        return len(self.depth)

    @classmethod
    def of(cls, seen: list[CameraGeometry]) -> Self:
        """What was seen at T control steps."""
        return cls(
            np.stack([packed(one.depth) for one in seen]),
            np.stack([one.intrinsics for one in seen]).astype(np.float32),
            np.stack([one.pose for one in seen]).astype(np.float32),
        )


def packed(depth: npt.NDArray[np.float32], unit_m: float = DEPTH_UNIT_M) -> npt.NDArray[np.uint16]:
    """Metres float32 [...] as uint16 [...] in units of `unit_m`; 0 for what is unknown or too far."""
    units = np.rint(depth.astype(np.float64) / unit_m)
    return np.where((units > 0) & (units <= _DEEPEST), units, 0).astype(np.uint16)


def unpacked(depth: npt.NDArray[np.uint16], unit_m: float = DEPTH_UNIT_M) -> npt.NDArray[np.float32]:
    """The inverse of `packed`, to half a unit."""
    return (depth.astype(np.float64) * unit_m).astype(np.float32)


def _middles(pixels: int, patches: int) -> npt.NDArray[np.int64]:
    """int64 [patches], the pixel in the middle of each patch of a line; of two, the second."""
    return ((np.arange(patches) + 0.5) * pixels / patches).astype(np.int64)
