"""Where a parallel gripper takes an object, from shapes alone.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ipvla.sim.demonstration import Vector
from ipvla.sim.standard.geometry import SceneGeometry

#: The fingers open to 8 cm; what is wider than this is not taken across.
_WIDEST_M: Final = 0.07
#: The open hand, from the middle between its pads: where fingers and palm are along the direction in which the
#: fingers open, how broad they are across it, and how far below (tips) or above (palm) they begin.
_FINGERS_M: Final = np.concatenate([np.linspace(-0.068, -0.034, 8), np.linspace(0.034, 0.068, 8)])
_PALM_M: Final = np.linspace(-0.105, 0.105, 22)
_HALF_FINGER_M, _HALF_PALM_M = 0.012, 0.035
TIPS_M, _PALM_BOTTOM_M = -0.017, 0.024
#: How deep the pads are below the top of what is taken, and at least above what it stands on. With the palm on the
#: top it could no longer come nearer from aside.
_DEPTH_M, _LEAST_M = 0.018, 0.014
#: Of what reaches down at least so far below the pads, the fingers also get hold when they are so much off.
_TALL_M, _TALL_SLACK_M = 0.02, 0.006
#: At a rim: the deeper the surer, but the palm may be in the way; walls lean inwards below it.
_RIM_DEPTHS_M, _RIM_INSET_M = (0.027, 0.022, 0.017), 0.008
#: What makes a grasp the worse choice, in metres of being in the way.
_PER_RADIAN, _AT_RIM, _SHALLOWER = 0.01, 0.02, 0.004
_DIRECTIONS: Final = 12


@dataclass(frozen=True)
class Grasp:
    """Where the middle between the pads goes, relative to the object's centre, and how the hand is turned.

    Attributes:
        offset: float64 [3] in metres.
        axis: direction in which the fingers open, radians from the x axis.
        slack_m: how much less exactly than usual the hand must be there when the fingers begin to close.
    """

    offset: Vector
    axis: float
    slack_m: float = 0.0


def plan_grasp(scene: SceneGeometry, name: str, tried: int = 0, goal: Vector | None = None) -> Grasp:
    """The grasp of an object with most room for the hand and, of several, that with the smallest turn.

    What is narrow enough in some direction is taken across its middle, what is wider at its rim.

    Args:
        tried: how many grasps failed before; the next best is chosen.
        goal: float64 [2], where it goes, as high as it is now: the hand needs room there as well.
    """
    now = scene.place(name)
    places = [now] if goal is None else [now, np.array([*goal, now[2]])]

    def cost(one: tuple[float, Grasp]) -> float:
        return one[0] + sum(_in_the_way(scene, name, one[1], at) for at in places)

    ranked = sorted(_grasps(scene, name), key=cost)
    return ranked[tried % len(ranked)][1]


def turn(now: float, axis: float) -> float:
    """By how much the hand turns for its fingers to open along `axis`: radians in [-pi/2, pi/2)."""
    return (axis - now + np.pi / 2) % np.pi - np.pi / 2


def _grasps(scene: SceneGeometry, name: str) -> Iterator[tuple[float, Grasp]]:
    """(what speaks against it, a grasp), for directions all around."""
    corners = scene.corners(name) - scene.place(name)
    least = float(corners[:, 2].min()) + _LEAST_M
    now = scene.opening()
    for axis in now + np.arange(_DIRECTIONS) * np.pi / _DIRECTIONS:
        along, across = directions(axis)
        cost = _PER_RADIAN * abs(turn(now, axis))
        reach, breadth = corners[:, :2] @ along, corners[:, :2] @ across
        width = reach.max() - reach.min()
        middle = along * (reach.max() + reach.min()) / 2 + across * (breadth.max() + breadth.min()) / 2
        if width <= _WIDEST_M:
            height = max(float(corners[:, 2].max()) - _DEPTH_M, least)
            slack = _TALL_SLACK_M if height - least > _TALL_M else 0.0
            yield cost, Grasp(np.array([*middle, height]), axis, slack)
            continue
        for side in (-1, 1):
            rim = middle + side * along * (width / 2 - _RIM_INSET_M)
            near = np.linalg.norm(corners[:, :2] - rim, axis=1) < 2 * _HALF_FINGER_M
            edge = corners[near, 2].max(initial=least)
            for shallower, depth in enumerate(_RIM_DEPTHS_M):
                grasp = Grasp(np.array([*rim, max(edge - depth, least)]), axis)
                yield cost + _AT_RIM + _SHALLOWER * shallower, grasp


def _in_the_way(scene: SceneGeometry, name: str, grasp: Grasp, place: Vector) -> float:
    """How far something reaches up into where fingers and palm are with the object at `place`, [3], in metres."""
    along, across = directions(grasp.axis)
    at = place + grasp.offset
    blocked = 0.0
    for places, half, above in ((_FINGERS_M, _HALF_FINGER_M, TIPS_M), (_PALM_M, _HALF_PALM_M, _PALM_BOTTOM_M)):
        asides = np.linspace(-half, half, 5)
        points = at[:2] + (places[:, None, None] * along + asides[:, None] * across).reshape(-1, 2)
        blocked += max(float(scene.height(points, without=name).max() - at[2]) - above, 0.0)
    return blocked


def directions(axis: float) -> tuple[Vector, Vector]:
    """Unit vectors [2]: along the opening, and across it."""
    along = np.array([np.cos(axis), np.sin(axis)])
    return along, np.array([-along[1], along[0]])
