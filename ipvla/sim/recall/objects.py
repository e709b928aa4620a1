"""Buttons, cups, cubes and a bowl built from primitive geoms: LIBERO objects that need no asset files.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

import copy
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import partial

from libero.libero.envs.base_object import OBJECTS_DICT
from robosuite.models.objects import MujocoGeneratedObject

from ipvla.sim.recall.scene import (
    BALL_RADIUS_M,
    BOWL_HEIGHT_M,
    BOWL_RADIUS_M,
    BUTTON_HEIGHT_M,
    BUTTON_RADIUS_M,
    CUBE_HALF_SIZE_M,
    CUP_HEIGHT_M,
    CUP_RADIUS_M,
    CUP_RGBA,
    PALETTE,
    TABLE_TOP_M,
    Rgba,
)

Attributes = dict[str, str]

#: Fixtures stand on stiff slide joints: so their place is part of qpos, which saved states keep.
_SLIDE: Attributes = {"type": "slide", "damping": "200", "frictionloss": "30", "armature": "1"}
_PLANAR = ({**_SLIDE, "name": "x", "axis": "1 0 0"}, {**_SLIDE, "name": "y", "axis": "0 1 0"})
_FREE = ({"type": "free", "name": "free", "damping": "0.0005"},)
#: Collides with the robot and with free objects, but not with the table or with other fixtures.
_FIXTURE = {"contype": "1", "conaffinity": "0"}
_UNTOUCHABLE = {"contype": "0", "conaffinity": "0"}

_BOWL_SIDES = 10
_BOWL_WALL_M = 0.004
_BOWL_RGBA: Rgba = (0.9, 0.9, 0.85, 1.0)


class ProceduralObject(MujocoGeneratedObject):
    """One body of primitive geoms; every collision geom has a visual twin named `<geom>_visual`.

    Attributes:
        base_height_m: height of the body's origin above the table when the object rests on it.
        rgba: its colour at rest.
    """

    def __init__(
        self,
        name: str,
        geoms: Sequence[Attributes],
        joints: Sequence[Attributes],
        rgba: Rgba,
        base_height_m: float,
    ) -> None:
        super().__init__()
        self._name = name
        self.base_height_m = base_height_m
        self.rgba = rgba
        self._obj = ET.Element("body", name="main", pos=f"0 0 {TABLE_TOP_M + base_height_m}")
        for geom in geoms:
            ET.SubElement(self._obj, "geom", {**geom, **self.get_collision_attrib_template()})
            visual: Attributes = {key: geom[key] for key in ("type", "size", "pos", "euler") if key in geom}
            visual |= {"name": f"{geom['name']}_visual", "rgba": _numbers(rgba)}
            ET.SubElement(self._obj, "geom", {**visual, **self.get_visual_attrib_template()})
        for joint in joints:
            ET.SubElement(self._obj, "joint", joint)
        site = self.get_site_attrib_template() | {"name": "default_site", "rgba": "0 0 0 0"}
        ET.SubElement(self._obj, "site", site)
        self._get_object_properties()

    def _get_object_subtree(self) -> ET.Element:
        return copy.deepcopy(self._obj)


def _cap(radius_m: float, height_m: float) -> Attributes:
    size = _numbers((radius_m, height_m / 2))
    return {"name": "cap", "type": "cylinder", "size": size, "mass": "1", **_FIXTURE}


def _button(name: str, colour: str) -> ProceduralObject:
    cap = _cap(BUTTON_RADIUS_M, BUTTON_HEIGHT_M)
    return ProceduralObject(name, [cap], _PLANAR, PALETTE[colour], BUTTON_HEIGHT_M / 2)


def _cup(name: str) -> ProceduralObject:
    """Closed, with a place for a ball inside, which is drawn only where there is one."""
    ball = {
        "name": "ball",
        "type": "sphere",
        "size": _numbers((BALL_RADIUS_M,)),
        "pos": _numbers((0, 0, BALL_RADIUS_M - CUP_HEIGHT_M / 2)),
        "mass": "0.001",
        **_UNTOUCHABLE,
    }
    return ProceduralObject(name, [_cap(CUP_RADIUS_M, CUP_HEIGHT_M), ball], _PLANAR, CUP_RGBA, CUP_HEIGHT_M / 2)


def _cube(name: str, colour: str) -> ProceduralObject:
    """Free, so that the gripper can hold it."""
    cube = {
        "name": "cube",
        "type": "box",
        "size": _numbers((CUBE_HALF_SIZE_M,) * 3),
        "density": "300",
        "friction": "1.5 0.02 0.001",
        "condim": "4",
    }
    return ProceduralObject(name, [cube], _FREE, PALETTE[colour], CUBE_HALF_SIZE_M)


def _bowl(name: str) -> ProceduralObject:
    """A disc with a low polygonal wall."""
    base = {
        "name": "base",
        "type": "cylinder",
        "size": _numbers((BOWL_RADIUS_M, _BOWL_WALL_M)),
        "pos": _numbers((0, 0, _BOWL_WALL_M)),
        "mass": "1",
        **_FIXTURE,
    }
    return ProceduralObject(name, [base, *map(_bowl_wall, range(_BOWL_SIDES))], _PLANAR, _BOWL_RGBA, 0.0)


def _bowl_wall(side: int) -> Attributes:
    angle = 2 * math.pi * side / _BOWL_SIDES
    half_length = BOWL_RADIUS_M * math.tan(math.pi / _BOWL_SIDES) + _BOWL_WALL_M / 2
    half_height = BOWL_HEIGHT_M / 2
    return {
        "name": f"wall{side}",
        "type": "box",
        "size": _numbers((_BOWL_WALL_M, half_length, half_height)),
        "pos": _numbers((BOWL_RADIUS_M * math.cos(angle), BOWL_RADIUS_M * math.sin(angle), half_height)),
        "euler": _numbers((0, 0, angle)),
        "mass": "0.05",
        **_FIXTURE,
    }


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


OBJECTS_DICT.update({f"{colour}_button": partial(_button, colour=colour) for colour in PALETTE})
OBJECTS_DICT.update({"red_cube": partial(_cube, colour="red"), "bowl": _bowl, "cup": _cup})
