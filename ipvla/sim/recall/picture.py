"""Where a point of the world is in the camera's picture, told in the cells of a coarse grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

#: Columns and rows of the grid that plans speak of.
GRID: Final = 16

#: Column from the left and row from the top, each in [0, GRID).
Cell = tuple[int, int]


@dataclass(frozen=True)
class PinholeCamera:
    """A camera with a square picture, as MuJoCo has it: it looks along its own -z, x is right and y is up.

    Attributes:
        position_m: float64 [3], in world coordinates.
        rotation: float64 [3, 3], its axes as columns, in world coordinates.
        fovy_deg: vertical angle of view.
    """

    position_m: npt.NDArray[np.float64]
    rotation: npt.NDArray[np.float64]
    fovy_deg: float

    def project(self, point_m: npt.NDArray[np.float64]) -> tuple[float, float]:
        """Right and down from the upper left corner, in parts of the picture's side; [0, 1] inside the picture.

        Args:
            point_m: float64 [3], in world coordinates, in front of the camera.
        """
        right, up, back = (point_m - self.position_m) @ self.rotation
        scale = -0.5 / (back * np.tan(np.radians(self.fovy_deg) / 2))
        return float(0.5 + right * scale), float(0.5 - up * scale)

    def cell(self, point_m: npt.NDArray[np.float64]) -> Cell:
        """The grid's cell that shows the point, or the nearest one if the point is beside the picture."""
        column, row = (min(max(int(GRID * part), 0), GRID - 1) for part in self.project(point_m))
        return column, row
