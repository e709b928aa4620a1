"""LIBERO's own suites and LIBERO-PRO's as lists of tasks, read from the packages' files, not imported."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from ipvla.sim.altered_tasks import GOAL_SWAP, goal_and_scene, listed, paraphrases, task_and_kind
from ipvla.sim.simulator import Task
from ipvla.sim.standard.assets import AssetsError, package_directory

#: Suite -> control steps until an episode is over, as OpenVLA's evaluation has them (twice what the longest
#: demonstration takes, roughly). Protocols say their own.
HORIZONS: Final = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
#: What LIBERO-PRO (arXiv 2510.03827) changes in a suite, by the ending of its name: "lan" the instruction,
#: "object" how objects look, "swap" where they stand, "task" the goal with its instruction.
PERTURBATIONS: Final = ("lan", "object", "swap", "task")
PRO_SUITES: Final = tuple(
    f"{suite}_{change}" for suite in HORIZONS if suite != "libero_90" for change in PERTURBATIONS
)
#: Of a task file: name and target of a region.
_REGION: Final = re.compile(r"\((\w+)\s*\(:target (\w+)\)")
#: Where `make assets` installs LIBERO-PRO's package: apart from the others, since it is named `libero` as well.
PRO_ROOT: Final = Path(sys.prefix) / "libero_pro" / "libero" / "libero"


def base_suite(suite: str) -> str:
    """The suite of which this one is a perturbation; itself if it is none."""
    return suite.rpartition("_")[0] if suite in PRO_SUITES else suite


def reworded(suite: str) -> bool:
    """Whether LIBERO-Plus has other instructions for the suite's goals, and the suite has none itself."""
    return base_suite(suite) != "libero_90" and not suite.endswith(("_lan", "_task"))


@cache
def standard_tasks(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite in LIBERO's order.

    Raises:
        KeyError: the name is neither in `HORIZONS` nor in `PRO_SUITES`.
        AssetsError: LIBERO-PRO's package is not installed, or one of its task files has no instruction.
    """
    base = base_suite(suite)
    # A published instruction is the file's name; where the instruction is changed, the name is still the old one.
    renamed = suite.endswith(("_lan", "_task"))
    return tuple(
        Task(
            name,
            family=suite,
            phrasings=(instruction_within(bddl_file(suite, name)) if renamed else instruction(name),),
            horizon=HORIZONS[base],
            chance=0.0,
        )
        for name in _listed()[base]
    )


def unlisted_task(suite: str, name: str) -> Task | None:
    """The task of this name that a suite does not list (`ipvla.sim.altered_tasks`); None if there is none.

    Raises:
        ValueError: it is made of a task that the suite does not have, or the scene does not allow the goal.
        AssetsError: a task file cannot be read.
    """
    if (swapped := goal_and_scene(name)) is not None:
        goal, scene = (listed(suite, standard_tasks(suite), part) for part in swapped)
        _require_allowed(suite, goal.name, scene.name)
        return replace(goal, name=name, family=GOAL_SWAP)
    if (said := task_and_kind(name)) is not None:
        task = listed(suite, standard_tasks(suite), said[0])
        return replace(task, name=name, phrasings=paraphrases(suite, task, said[1]))
    return None


def _require_allowed(suite: str, goal: str, scene: str) -> None:
    """ValueError if a scene lacks what another task's goal speaks of, or has the same goal."""
    wanted, there = (bddl_file(suite, name).read_text(encoding="utf-8") for name in (goal, scene))
    if _goal(wanted) == _goal(there):
        raise ValueError(f"{goal!r} is what {scene!r} demands anyway; choose another goal")
    things = {*re.findall(r"\b\w+_\d+\b", there), *(f"{of}_{name}" for name, of in _REGION.findall(there))}
    named = {word for predicate in re.findall(r"\(([^()]*)\)", _goal(wanted)) for word in predicate.split()[1:]}
    if lacking := sorted(named - things):
        raise ValueError(f"{goal!r} cannot be done in the scene of {scene!r}, which has no {', '.join(lacking)}")


def _goal(bddl: str) -> str:
    """The text of a task file's goal."""
    return " ".join(bddl.partition("(:goal")[2].split())


def instruction(name: str) -> str:
    """A task's name in words, without the scene, as every public evaluation says it."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def bddl_file(suite: str, task: str) -> Path:
    """What LIBERO builds the task from. AssetsError if LIBERO-PRO's package has to be installed."""
    return _root(suite) / "bddl_files" / suite / f"{task}.bddl"


def initial_states(suite: str, task: str) -> npt.NDArray[np.float64]:
    """float64 [50, 1 + positions + velocities]: the published initial states, as MuJoCo's flattened state.

    Raises:
        AssetsError: LIBERO-PRO's package has to be installed, or the file is damaged.
    """
    path = _root(suite) / "init_files" / suite / f"{task}.pruned_init"
    try:
        return _states(path, suite in PRO_SUITES)
    except (OSError, ValueError, LookupError, EOFError, RuntimeError, BadZipFile, UnpicklingError) as error:
        raise AssetsError(
            f"the initial states {path} cannot be read ({error}); install the package again: make assets"
        ) from None


def _states(path: Path, packed: bool) -> npt.NDArray[np.float64]:
    if packed:
        with np.load(f"{path}.npz", allow_pickle=False) as stored:
            return np.asarray(stored["states"], dtype=np.float64)
    import torch
    from numpy._core import multiarray

    rebuild = (multiarray._reconstruct, "numpy.core.multiarray._reconstruct")  # its name in NumPy 1
    safe: list[Any] = [rebuild, np.ndarray, np.dtype, type(np.dtype(np.float64))]
    with torch.serialization.safe_globals(safe):  # else these pickles would be let do anything
        return np.asarray(torch.load(path, weights_only=True), dtype=np.float64)


def _root(suite: str) -> Path:
    if suite not in PRO_SUITES:
        return package_directory()
    if not (PRO_ROOT / "bddl_files" / suite).is_dir():
        raise AssetsError(f"suite {suite} needs LIBERO-PRO's task files, and {PRO_ROOT} has none; run make assets")
    return PRO_ROOT


def instruction_within(path: Path) -> str:
    """A task file's own instruction. AssetsError if it has none."""
    found = re.search(r"\(:language\s+([^()]+)\)", path.read_text(encoding="utf-8"))
    if found is None:
        raise AssetsError(f"{path} has no (:language ...); install the package again: make assets")
    return " ".join(found[1].split())


@cache
def _listed() -> dict[str, list[str]]:
    """Suite -> names, from the literal in the package's task map."""
    source = (package_directory() / "benchmark" / "libero_suite_task_map.py").read_text()
    assignment = ast.parse(source).body[0]
    assert isinstance(assignment, ast.Assign)
    listed: dict[str, list[str]] = ast.literal_eval(assignment.value)
    return listed
