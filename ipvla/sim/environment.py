"""The environment variables and packages that simulators depend on, checked before a process starts one.

A variable that is set but empty counts as unset. Nothing here imports LIBERO, robosuite or MuJoCo.
"""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final

#: GL backends that draw without a display.
RENDERERS: Final = ("osmesa", "egl")


class SimulatorError(ValueError):
    """This machine or its environment cannot run the simulators."""


def environment_variable(name: str, default: str) -> str:
    """Its value; the default if it is unset or empty."""
    return os.environ.get(name) or default


def renderer() -> str:
    """MuJoCo's GL backend, of `RENDERERS`: MUJOCO_GL, by default osmesa.

    Raises:
        SimulatorError: MUJOCO_GL names another one, or PYOPENGL_PLATFORM does not agree with it.
    """
    backend = environment_variable("MUJOCO_GL", "osmesa").strip().lower()
    if backend not in RENDERERS:
        raise SimulatorError(
            f"MUJOCO_GL is {backend!r}, which does not draw without a display; set it to osmesa (CPU) or egl (GPU)"
        )
    platform = environment_variable("PYOPENGL_PLATFORM", backend).strip().lower()
    if platform != backend:
        by_default = "" if os.environ.get("MUJOCO_GL") else " (the default)"
        raise SimulatorError(
            f"PYOPENGL_PLATFORM is {platform!r}, MUJOCO_GL {backend!r}{by_default}; set both to the same backend, "
            "or unset PYOPENGL_PLATFORM"
        )
    return backend


def gl_environment() -> dict[str, str]:
    """Environment variables of a process that renders: OSMesa unless MUJOCO_GL says EGL.

    With MUJOCO_GL=egl all draw on the GPU that MUJOCO_EGL_DEVICE_ID names, by default the first.

    Raises:
        SimulatorError: as `renderer` does.
    """
    backend = renderer()
    variables = {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    if backend == "egl":  # robosuite would look for the device among CUDA's, which simulators do not see
        variables["MUJOCO_EGL_DEVICE_ID"] = environment_variable("MUJOCO_EGL_DEVICE_ID", "0")
    return variables


def require_simulators() -> None:
    """Checks the renderer's variables, and that `libero` is the pinned package.

    Raises:
        SimulatorError: a variable is wrong, or another LIBERO comes first on the path.
    """
    renderer()
    found = PathFinder.find_spec("libero")
    for directory in (found.submodule_search_locations or ()) if found else ():
        package = Path(directory) / "libero" / "__init__.py"
        # The published repository has no such name; the pinned package has.
        if not package.is_file() or "_assets_path_cache" not in package.read_text():
            raise SimulatorError(
                f"Python finds LIBERO in {directory}, which is not the package of requirements-libero.txt; "
                "take that directory off PYTHONPATH"
            )
