"""Depth of what a robosuite simulation shows: a renderer of its own, which exists once somebody has asked.

MuJoCo's anti-aliasing takes a pixel's depth from one of several samples beside its centre, which is millimetres
off (measured: 4.5 mm at 64 px and 1.2 m, 0.01 mm without). It belongs to a renderer, so pictures keep theirs.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from typing import Any, Final

import mujoco
import numpy as np
import numpy.typing as npt

from ipvla.geometry import CameraGeometry, pinhole
from ipvla.sim.drawing import release_context

#: What costs time and has no depth.
_NOT_DRAWN: Final = (
    mujoco.mjtRndFlag.mjRND_SHADOW,
    mujoco.mjtRndFlag.mjRND_REFLECTION,
    mujoco.mjtRndFlag.mjRND_SKYBOX,
    mujoco.mjtRndFlag.mjRND_HAZE,
)
_MOST_GEOMS: Final = 1000
#: From MuJoCo's camera axes (x right, y up, z back) to x right, y down, z forward.
_FORWARD: Final = np.diag([1.0, -1.0, -1.0, 1.0])


class DepthContext:
    """Draws depth of square pictures. Neither physics nor the renderer of pictures learns of it.

    Args:
        sim: the robosuite simulation, whose renderer shows its state.
        size: side of the depth maps, in pixels.
    """

    def __init__(self, sim: Any, size: int) -> None:
        self._sim, self._size, self._freed = sim, size, False
        model, shown = sim.model._model, sim._render_context_offscreen
        self._gl = type(shown.gl_ctx)(max_width=size, max_height=size, device_id=shown.device_id)
        self._gl.make_current()
        quality, buffer = model.vis.quality, model.vis.global_
        before = quality.offsamples, buffer.offwidth, buffer.offheight
        quality.offsamples, buffer.offwidth, buffer.offheight = 0, size, size
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        quality.offsamples, buffer.offwidth, buffer.offheight = before
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=_MOST_GEOMS)
        for flag in _NOT_DRAWN:
            self._scene.flags[flag] = 0

    def view(self, name: str) -> CameraGeometry:
        """The geometry of a camera's upright picture, of the state that was drawn last.

        Args:
            name: the camera's, by MuJoCo.
        """
        model, shown, size = self._sim.model._model, self._sim._render_context_offscreen, self._size
        data, number = shown.data._data, self._sim.model.camera_name2id(name)
        camera = mujoco.MjvCamera()
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, number
        self._gl.make_current()
        every = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, shown.vopt, shown.pert, camera, every, self._scene)
        window, buffer = mujoco.MjrRect(0, 0, size, size), np.empty((size, size), np.float32)
        mujoco.mjr_render(window, self._scene, self._context)
        mujoco.mjr_readPixels(rgb=None, depth=buffer, viewport=window, con=self._context)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = data.cam_xmat[number].reshape(3, 3), data.cam_xpos[number]
        near, far = (float(share * model.stat.extent) for share in (model.vis.map.znear, model.vis.map.zfar))
        return CameraGeometry(
            metric(buffer[::-1], near, far),  # OpenGL's first row is the lowest
            pinhole(float(model.cam_fovy[number]), size, size),
            pose @ _FORWARD,
        )

    def free(self) -> None:
        """Gives everything back; harmless when called again."""
        if not self._freed:
            self._freed = True
            release_context(self._gl, self._context)


def metric(buffer: npt.NDArray[np.float32], near: float, far: float) -> npt.NDArray[np.float32]:
    """A z-buffer in [0, 1] as metres along the camera's axis; 0 where nothing was drawn.

    Args:
        near, far: the clipping planes, in metres.
    """
    z = buffer.astype(np.float64)
    return np.where(z < 1, near / (1 - z * (1 - near / far)), 0).astype(np.float32)
