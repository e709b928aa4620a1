"""A renderer that can live beside others in one process.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from typing import Any

from robosuite.utils.binding_utils import MjRenderContextOffscreen


class RenderContext(MjRenderContextOffscreen):
    """robosuite's off-screen renderer, in its own GL context at every use.

    robosuite makes a context current only when it is built: with two simulators in a process, the first one would
    draw into the second one's buffers, and whichever is freed first would free the other's.
    """

    def render(self, *args: Any, **kwargs: Any) -> None:
        self.gl_ctx.make_current()
        super().render(*args, **kwargs)

    def __del__(self) -> None:
        if hasattr(self, "con"):
            self.gl_ctx.make_current()
            super().__del__()
