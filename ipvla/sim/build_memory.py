"""Memory that building a MuJoCo model leaves behind, given back; the model and its pictures stay as they are.

Of 2.2 GiB that a simulator of libero_object held, 1.0 GiB was of this kind: MuJoCo's cache of decoded textures and
meshes (up to 500 MB per process), the last model's specification with all of them once more, and freed pages that
the allocator did not return.

Import only in or after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import mujoco


@cache
def _library() -> ctypes.CDLL:
    """MuJoCo's own library, which its Python module has loaded; its bindings lack these functions."""
    path = next(Path(mujoco.__file__).parent.glob("libmujoco*"))
    library = ctypes.CDLL(str(path))
    library.mj_globalCache.restype = ctypes.c_void_p
    library.mj_setCacheSize.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mj_setCacheSize.restype = None
    return library


@cache
def without_asset_cache() -> None:
    """Decoded textures and meshes are not stored. Only before a process's first model: later on MuJoCo crashes."""
    _library().mj_setCacheSize(_library().mj_globalCache(), 0)


def release() -> None:
    """Frees what the models that were built so far do not need."""
    _library().mj_freeLastXML()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
