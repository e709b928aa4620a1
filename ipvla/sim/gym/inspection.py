"""Whether environments are what their settings say, found out in the process that `python` names.

    python -m ipvla.sim.gym.inspection < SETTINGS.json

The last line of its output is JSON: `{"error": TEXT}`, or `{"versions": {NAME: VERSION}}`.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata

import gymnasium
import numpy as np

from ipvla.sim.gym.settings import GymError, GymSettings
from ipvla.sim.gym.simulator import GymSimulator, keys

_SIDE = 16


def inspect(settings: GymSettings) -> dict[str, str]:
    """Makes every task's environment, plays a step in it, and compares.

    Returns:
        Package -> version, of what the settings name.

    Raises:
        GymError: what does not fit, in one line.
    """
    for task in settings.listed():
        simulator = GymSimulator(settings, task, _SIDE, tuple(settings.cameras))
        try:
            _compare(settings, simulator)
        except GymError as error:
            at = f"tasks.{task.name}: "
            raise GymError(at + str(error).removeprefix(at)) from None
        finally:
            simulator.close()
    return {name: _version(name) for name in ("gymnasium", *settings.packages)}


def _compare(settings: GymSettings, simulator: GymSimulator) -> None:
    space = simulator.environment.action_space
    if not isinstance(space, gymnasium.spaces.Box):
        raise GymError(f"its actions are {space}; policies give numbers, so it must be a Box")
    if space.shape != (settings.action_size,):
        raise GymError(f"action_size is {settings.action_size}, its actions are {list(space.shape)}")
    seen = simulator.environment.reset(seed=1)[0]
    simulator.reset(1)
    state = simulator.proprio()
    if state.shape != (settings.state_size,):
        given = f"; observations have {', '.join(keys(seen))}"
        raise GymError(f"state_size is {settings.state_size}, its state has {len(state)} numbers{given}")
    simulator.reset(2)
    simulator.reset(1)
    if not np.array_equal(simulator.proprio(), state):
        raise GymError("the same seed begins two episodes differently, so no results could be compared")
    for camera, key in settings.cameras.items():
        picture = simulator.picture(camera)
        fits = isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3
        if not fits or picture.dtype != np.uint8:
            raise GymError(f"camera {camera} ({key}) is {_described(picture)}; it must be uint8 [H, W, 3]")
    simulator.step(np.clip(np.zeros(settings.action_size), space.low, space.high))
    if settings.tasks[simulator.task.name].expert:
        simulator.reset(1)
        simulator.expert(np.random.default_rng(0))


def _described(picture: object) -> str:
    if isinstance(picture, np.ndarray):
        return f"{picture.dtype} {list(picture.shape)}"
    return "nothing" if picture is None else f"a {type(picture).__name__}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise GymError(f"{package} is not installed where {sys.executable} looks; install it there") from None


def found(text: str) -> Mapping[str, object]:
    """What the command answers to these settings."""
    try:
        process = {"python": platform.python_version(), "ray": _version("ray")}
        versions = inspect(GymSettings.from_dict(json.loads(text)))
    except GymError as error:
        return {"error": " ".join(str(error).split())}
    return {"versions": versions, "process": process}


if __name__ == "__main__":
    print("\n" + json.dumps(found(sys.stdin.read())), flush=True)
