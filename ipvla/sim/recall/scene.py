"""The Recall scenes: sizes, colours, the workspace, the arena as MJCF, and where its camera shows a point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

#: Height of the table's surface above the floor.
TABLE_TOP_M: Final = 0.90
#: Length, width and thickness. The arm stands behind the table's edge: from a longer table its elbow locks before
#: it reaches the far buttons.
TABLE_SIZE_M: Final = (0.86, 1.2, 0.05)
BUTTON_RADIUS_M: Final = 0.040
BUTTON_HEIGHT_M: Final = 0.024
CUP_RADIUS_M: Final = 0.040
CUP_HEIGHT_M: Final = 0.050
BALL_RADIUS_M: Final = 0.025
CUBE_HALF_SIZE_M: Final = 0.022
BOWL_RADIUS_M: Final = 0.060
BOWL_HEIGHT_M: Final = 0.030

#: Where objects may lie, relative to the table's centre. The Panda's elbow locks beyond x = 0.1 m.
WORKSPACE_X_M: Final = (-0.22, 0.09)
WORKSPACE_Y_M: Final = (-0.25, 0.25)
#: Smallest distance between the centres of two objects; the closed fingers fit between two buttons.
MIN_DISTANCE_M: Final = 0.11
#: Two cups that change places pass each other this far apart, and any other cup at least `SWAP_CLEARANCE_M`.
SWAP_PASSING_M: Final = 0.10
SWAP_CLEARANCE_M: Final = 0.10

Rgba = tuple[float, float, float, float]

PALETTE: Final[dict[str, Rgba]] = {
    "red": (0.85, 0.08, 0.08, 1.0),
    "green": (0.05, 0.65, 0.10, 1.0),
    "blue": (0.10, 0.20, 0.90, 1.0),
    "yellow": (0.95, 0.80, 0.05, 1.0),
    "gray": (0.45, 0.45, 0.45, 1.0),
}
CUP_RGBA: Final[Rgba] = (0.35, 0.30, 0.70, 1.0)
#: A cup while it shows what is under it; the ball is drawn in that time only.
GLASS_RGBA: Final[Rgba] = (0.35, 0.30, 0.70, 0.2)
BALL_RGBA: Final[Rgba] = PALETTE["red"]
INVISIBLE_RGBA: Final[Rgba] = (0.0, 0.0, 0.0, 0.0)
#: A button while it is the cue, and while it acknowledges a press.
CUE_RGBA: Final[Rgba] = (1.0, 0.95, 0.2, 1.0)
FLASH_RGBA: Final[Rgba] = (1.0, 1.0, 1.0, 1.0)
#: The go-lamp while the arm is locked, and once it may move.
LAMP_OFF_RGBA: Final[Rgba] = (0.1, 0.1, 0.1, 1.0)
LAMP_ON_RGBA: Final[Rgba] = (0.1, 0.9, 0.9, 1.0)

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


def arena_mjcf() -> str:
    """MJCF text of the arena. No shadows: they cost more than everything else that is drawn."""
    half = " ".join(str(side / 2) for side in TABLE_SIZE_M)
    lamp = " ".join(map(str, LAMP_OFF_RGBA))
    top = TABLE_SIZE_M[2] / 2
    return f"""<mujoco model="recall_arena">
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".9 .9 1" rgb2=".5 .6 .7" width="32" height="32"/>
    <texture name="tiles" type="2d" builtin="checker" rgb1=".55 .5 .45" rgb2=".5 .45 .4" width="64" height="64"/>
    <material name="floor" texture="tiles" texrepeat="4 4" texuniform="true" reflectance="0"/>
  </asset>
  <worldbody>
    <geom name="floor" type="plane" size="3 3 0.125" material="floor" group="1" condim="3"/>
    <body name="table" pos="0 0 {TABLE_TOP_M - top}">
      <geom name="table_collision" type="box" size="{half}" group="0" friction="1 0.005 0.0001"
            contype="1" conaffinity="0"/>
      <geom name="table_visual" type="box" size="{half}" group="1" rgba="0.55 0.5 0.44 1"
            contype="0" conaffinity="0"/>
      <geom name="go_lamp" type="box" size="0.015 0.06 0.012" pos="0.13 0 {top + 0.01}" group="1" rgba="{lamp}"
            contype="0" conaffinity="0"/>
      <site name="table_top" pos="0 0 {top}" size="0.001" rgba="0 0 0 0"/>
    </body>
    <light name="sun" directional="true" castshadow="false" pos="1 1 4" dir="0.2 -0.15 -1"
           diffuse="0.45 0.45 0.45" ambient="0.1 0.1 0.1" specular="0.1 0.1 0.1"/>
    <camera name="agentview" mode="fixed" pos="0.42 0 1.42" xyaxes="0 1 0 -1 0 1" fovy="46"/>
  </worldbody>
</mujoco>
"""
