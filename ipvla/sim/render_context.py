"""A renderer that can live beside others in one process.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from robosuite.utils.binding_utils import MjRenderContextOffscreen

_OSMESA: Final = os.environ.get("MUJOCO_GL") == "osmesa"
if _OSMESA:
    from OpenGL import GL, osmesa


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
        self.gl_ctx.make_current()
        self.con.free()
        if _OSMESA:
            # MuJoCo forgets it (it compares pointers by identity): the next context would flush a freed one.
            osmesa.OSMesaMakeCurrent(None, None, GL.GL_FLOAT, 0, 0)
        self.gl_ctx.free()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # A process that ends gives everything back itself; PyOpenGL may be gone.
            self.free()
