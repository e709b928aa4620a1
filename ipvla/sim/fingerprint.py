"""What a result depends on besides code and seeds: versions of everything that changes physics or pixels.

The machine and its kernel are not among it: results of several machines are of one study.
"""

from __future__ import annotations

import platform
from importlib import metadata

from ipvla.sim.environment import renderer
from ipvla.sim.recall.tasks import VERSION

_PACKAGES = {
    "mujoco": "mujoco",
    "robosuite": "robosuite",
    "libero": "hf-libero",
    "torch": "torch",
    "numpy": "numpy",
}


def fingerprint() -> dict[str, str]:
    """Name -> version. Imports none of the packages, so it is cheap in a process that runs no simulator.

    Keys: mujoco, robosuite, libero, torch, numpy, python, renderer (MuJoCo's GL back end), recall (the embedded
    suite's version). A package that is not installed reads "absent".
    """
    return {
        **{name: _version(package) for name, package in _PACKAGES.items()},
        "python": platform.python_version(),
        "renderer": renderer(),
        "recall": VERSION,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
