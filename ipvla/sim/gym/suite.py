"""The suite of a Gymnasium settings file: facts cost nothing, environments live in simulators' processes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ipvla.sim.demonstration import Demonstration, Expert, Showing, demonstration_of
from ipvla.sim.environment import gl_environment
from ipvla.sim.gym.settings import GymError, GymSettings, suite_name
from ipvla.sim.simulator import Simulator, Task
from ipvla.sim.suite import Suite, SuiteEntry, SuiteFacts

if TYPE_CHECKING:
    from ipvla.sim.gym.simulator import GymSimulator

_SOURCE: Final = Path(__file__).resolve().parents[3]
_INSPECTION_S: Final = 300.0
_LONGEST_REASON: Final = 300


def gym_entry(path: Path) -> SuiteEntry:
    """The suite of a settings file, named as the file is. GymError if it is no such file."""
    return entry_of(suite_name(path), GymSettings.load(path))


def entry_of(name: str, settings: GymSettings) -> SuiteEntry:
    """The suite of these settings."""
    facts = SuiteFacts(
        default_protocol="gym",
        contract=settings.contract,
        has_expert=any(task.expert for task in settings.tasks.values()),
        replayable=settings.replayable,
        environment=partial(_environment, settings),
        python=_interpreter(settings.python),
        inspect=partial(_inspect, settings.to_json()),
        settings=settings.played(),
    )
    return SuiteEntry(name, partial(_suite, name, settings, facts), settings.listed, facts)


def _suite(name: str, settings: GymSettings, facts: SuiteFacts, cache_dir: Path) -> Suite:
    tasks = {task.name: task for task in settings.listed()}

    def build(task: str, camera_size: int, cameras: Sequence[str], profile: str, world_seed: int) -> Simulator:
        os.environ.update(gl_environment())  # before an environment's package chooses how to draw
        from ipvla.sim.gym.simulator import GymSimulator

        return GymSimulator(settings, tasks[task], camera_size, cameras)

    return Suite(
        name,
        settings.version,
        tuple(tasks.values()),
        build,
        expert=_expert if facts.has_expert else None,
        demonstrate=_demonstrate if facts.has_expert else None,
        facts=facts,
    )


def _environment(settings: GymSettings) -> Mapping[str, str]:
    """Variables of a simulator's process; one of another interpreter finds this project's source by them."""
    if not settings.python:
        return gl_environment()
    return {**gl_environment(), "PYTHONPATH": _python_path()}


def _interpreter(python: str) -> str:
    """Absolute, and not followed where it is a link: Python finds its environment by that name."""
    return os.path.abspath(Path(python).expanduser()) if python else ""


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(_SOURCE), os.environ.get("PYTHONPATH", ""))))


@cache
def _inspect(settings: str) -> Mapping[str, str]:
    """Versions of the suite's packages, once its environments have been found to be what its settings say.

    Raises:
        GymError: they are not, in one line.
    """
    python = GymSettings.from_dict(json.loads(settings)).python
    interpreter = _interpreter(python) or sys.executable
    environment = {**os.environ, **gl_environment(), "PYTHONPATH": _python_path(), "CUDA_VISIBLE_DEVICES": ""}
    command = [interpreter, "-m", "ipvla.sim.gym.inspection"]
    try:
        done = subprocess.run(
            command,
            input=settings,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_INSPECTION_S,
            check=False,
        )
    except OSError as error:
        raise GymError(f"python is {python!r}: {error.strerror}; give the path of an interpreter") from None
    except subprocess.TimeoutExpired:
        raise GymError(f"the environments did not open within {_INSPECTION_S:.0f} s; try them by hand") from None
    answer = _answer(done)
    if "error" in answer:
        raise GymError(answer["error"])
    if python:
        _require_same(python, answer["process"])
    versions: Mapping[str, str] = answer["versions"]
    return versions


def _answer(done: subprocess.CompletedProcess[str]) -> Mapping[str, Any]:
    lines = done.stdout.strip().splitlines()
    try:
        answer: Mapping[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise GymError(
            f"{done.args[0]} cannot run the environments (exit code {done.returncode}: {said:.{_LONGEST_REASON}})"
        ) from None
    return answer


def _require_same(python: str, there: Mapping[str, str]) -> None:
    """Ray's processes speak to each other only with the same versions."""
    here = {"python": platform.python_version(), "ray": metadata.version("ray")}
    for name, version in here.items():
        if there[name] != version:
            raise GymError(f"{python} has {name} {there[name]}, this process {version}; install the same there")


def _expert(simulator: Simulator, seed: int) -> Expert:
    return _as_gym(simulator).expert(_rng(simulator.task, seed))


def _demonstrate(simulator: Simulator, seed: int, showing: Showing) -> Demonstration | None:
    """One attempt of the task's expert; None if it did not succeed within the horizon."""
    if showing.start_offset_m:
        raise ValueError(f"start_offset_m is {showing.start_offset_m}; the environment says how it begins: give 0")
    gym = _as_gym(simulator)
    gym.reset(seed)
    return demonstration_of(gym.expert(_rng(simulator.task, seed)), gym, seed, None, showing.watch(gym))


def _rng(task: Task, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(task.name.encode())])


def _as_gym(simulator: Simulator) -> GymSimulator:
    from ipvla.sim.gym.simulator import GymSimulator

    if not isinstance(simulator, GymSimulator):
        raise ValueError(
            f"{simulator.task.name} is no task of a Gymnasium environment; this expert knows only those"
        )
    return simulator
