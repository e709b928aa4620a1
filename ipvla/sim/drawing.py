"""How robosuite draws here: in a renderer that can live beside others, and the robot by its collision meshes.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET
from typing import Any, Final

from robosuite.utils.binding_utils import MjRenderContextOffscreen

_OSMESA: Final = os.environ.get("MUJOCO_GL") == "osmesa"
if _OSMESA:
    from OpenGL import GL, osmesa

#: What robosuite's names of a robot's parts begin with.
_ROBOT = ("robot0_", "gripper0_", "mount0_")
_VISUAL_GROUP, _HIDDEN_GROUP = "1", "3"
_FINGER_RGBA, _ARM_RGBA = "0.35 0.35 0.35 1", "0.9 0.9 0.9 1"


class RenderContext(MjRenderContextOffscreen):
    """robosuite's off-screen renderer, in its own GL context at every use.

    robosuite makes a context current only when it is built: with two simulators in a process, the first one would
    draw into the second one's buffers, and whichever is freed first would free the other's.
    """

    _freed = False

    def render(self, *args: Any, **kwargs: Any) -> None:
        self.gl_ctx.make_current()
        super().render(*args, **kwargs)

    def free(self) -> None:
        """Gives everything back, from the thread that draws: a garbage collector may run in another one."""
        if self._freed or not hasattr(self, "con"):
            return
        self._freed = True
        release_context(self.gl_ctx, self.con)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # A process that ends gives everything back itself; PyOpenGL may be gone.
            self.free()


def release_context(gl: Any, context: Any) -> None:
    """Frees MuJoCo's renderer, then robosuite's GL context that it draws in."""
    gl.make_current()
    context.free()
    if _OSMESA:
        # MuJoCo forgets it (it compares pointers by identity): the next context would flush a freed one.
        osmesa.OSMesaMakeCurrent(None, None, GL.GL_FLOAT, 0, 0)
    gl.free()


def draw_collision_meshes(mjcf: str) -> str:
    """The same model: the robot's visual meshes shrunk to invisible dots, its collision meshes made visible.

    Of all savings this is the largest: the visual meshes have 350 k vertices.

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
