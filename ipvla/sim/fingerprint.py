"""What a result depends on besides seeds: the commit, and versions of everything that changes physics or pixels.

The machine and its kernel are not among it: results of several machines are of one study.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Final

from ipvla.sim.environment import renderer
from ipvla.sim.libero import PACKAGES
from ipvla.sim.recall.tasks import VERSION
from ipvla.storage import SOURCE_TREE

#: Tells the commit where the tree travelled without its repository; `ray_jobs.submit` sets it for its jobs.
COMMIT_VARIABLE: Final = "IPVLA_COMMIT"
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


def commit() -> str:
    """The hash of the commit that the source tree is at; `$IPVLA_COMMIT`, or "none", outside of git."""
    try:
        commit_hash = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=SOURCE_TREE
        ).stdout.strip()
    except FileNotFoundError:  # no git here
        commit_hash = ""
    return commit_hash or os.environ.get(COMMIT_VARIABLE) or "none"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
