"""Draws the robot by its collision meshes instead of its 350 k visual vertices: the largest saving of all."""

from __future__ import annotations

import xml.etree.ElementTree as ET

#: What robosuite's names of a robot's parts begin with.
_ROBOT = ("robot0_", "gripper0_", "mount0_")
_VISUAL_GROUP, _HIDDEN_GROUP = "1", "3"
_FINGER_RGBA, _ARM_RGBA = "0.35 0.35 0.35 1", "0.9 0.9 0.9 1"


def draw_collision_meshes(mjcf: str) -> str:
    """The same model: the robot's visual meshes shrunk to invisible dots, its collision meshes made visible.

    Names, masses and contacts stay: robosuite looks the visual geoms up, and bodies have inertias of their own.
    """
    root = ET.fromstring(mjcf)
    for geom in root.iterfind(".//geom[@type='mesh']"):
        if not geom.get("name", "").startswith(_ROBOT):
            continue
        if geom.get("group") == _VISUAL_GROUP:
            del geom.attrib["mesh"]
            geom.attrib.pop("material", None)
            geom.attrib.update(type="sphere", size="0.001", group=_HIDDEN_GROUP)
        else:
            finger = "finger" in geom.get("name", "")
            geom.attrib.update(group=_VISUAL_GROUP, rgba=_FINGER_RGBA if finger else _ARM_RGBA)
    used = {geom.get("mesh") for geom in root.iterfind(".//geom[@mesh]")}
    for asset in root.iterfind("asset"):
        for mesh in asset.findall("mesh"):
            if mesh.get("name") not in used:
                asset.remove(mesh)
    return ET.tostring(root, encoding="unicode")
