"""Sizes, colours and the workspace of the Recall scenes: plain numbers, shared by scene, sampler and expert."""

from __future__ import annotations

from typing import Final

#: Height of the table's surface above the floor.
TABLE_TOP_M: Final = 0.90
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
