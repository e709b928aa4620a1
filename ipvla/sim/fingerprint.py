"""What a result depends on besides code and seeds: versions of everything that changes physics or pixels.

The machine and its kernel are not among it: results of several machines are of one study.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

from ipvla.sim.environment import renderer
from ipvla.sim.libero import PACKAGES
from ipvla.sim.recall.tasks import VERSION

_EVERYWHERE = {"torch": "torch", "numpy": "numpy"}


def fingerprint(packages: Mapping[str, str] = PACKAGES) -> dict[str, str]:
    """Name -> version. Imports none of the packages, so it is cheap in a process that runs no simulator.

    Keys: those of `packages` (a suite's: name -> distribution), torch, numpy, python, renderer (MuJoCo's GL back
    end), recall (the embedded suite's version). A package that is not installed reads "absent".
    """
    return {
        **{name: _version(package) for name, package in {**packages, **_EVERYWHERE}.items()},
        "python": platform.python_version(),
        "renderer": renderer(),
        "recall": VERSION,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
