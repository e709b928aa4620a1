"""LIBERO's own suites as lists of tasks, read from the package's files without importing it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipvla.sim.simulator import Task
from ipvla.sim.standard.assets import package_directory

#: Suite -> control steps until an episode is over, as OpenVLA's evaluation has them (twice what the longest
#: demonstration takes, roughly). Protocols say their own.
HORIZONS: Final = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


@cache
def standard_tasks(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite in LIBERO's order. KeyError for a name that is not in `HORIZONS`."""
    horizon = HORIZONS[suite]
    return tuple(
        Task(name, family=suite, phrasings=(instruction(name),), horizon=horizon, chance=0.0)
        for name in _listed()[suite]
    )


def instruction(name: str) -> str:
    """A task's name in words, without the scene, as every public evaluation says it."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def bddl_file(suite: str, task: str) -> Path:
    """What LIBERO builds the task from."""
    return package_directory() / "bddl_files" / suite / f"{task}.bddl"


def initial_states(suite: str, task: str) -> npt.NDArray[np.float64]:
    """float64 [50, 1 + positions + velocities]: the published initial states, as MuJoCo's flattened state."""
    import torch
    from numpy._core import multiarray

    rebuild = (multiarray._reconstruct, "numpy.core.multiarray._reconstruct")  # its name in NumPy 1
    safe: list[Any] = [rebuild, np.ndarray, np.dtype, type(np.dtype(np.float64))]
    path = package_directory() / "init_files" / suite / f"{task}.pruned_init"
    with torch.serialization.safe_globals(safe):  # else these pickles would be let do anything
        return np.asarray(torch.load(path, weights_only=True), dtype=np.float64)


def _listed() -> dict[str, list[str]]:
    """Suite -> names, from the literal in the package's task map."""
    source = (package_directory() / "benchmark" / "libero_suite_task_map.py").read_text()
    assignment = ast.parse(source).body[0]
    assert isinstance(assignment, ast.Assign)
    listed: dict[str, list[str]] = ast.literal_eval(assignment.value)
    return listed
