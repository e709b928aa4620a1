"""A Simulator on a Gymnasium environment: the only file that imports gymnasium."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from PIL import Image

from ipvla.choices import did_you_mean
from ipvla.sim.demonstration import Expert
from ipvla.sim.gym.settings import RENDERED, WHOLE, GymError, GymSettings
from ipvla.sim.simulator import StepOutcome, Task
from ipvla.types import Observation

Numbers = npt.NDArray[np.float32]


class GymSimulator:
    """One task's environment. Its own step limit is off, for the task's horizon counts.

    Where all cameras are `render`, nothing is drawn but what is looked at; pictures that come with observations
    are drawn by the environment in every step.

    Args:
        settings: of the suite.
        task: one of them.
        camera_size: side of the policy's pictures, in pixels.
        cameras: of these pictures.

    Raises:
        GymError: the environment does not exist, cannot be made, or does not fit the settings.
    """

    def __init__(self, settings: GymSettings, task: Task, camera_size: int, cameras: Sequence[str]) -> None:
        if camera_size < 1:
            raise ValueError(f"camera_size {camera_size} is not positive; give the picture's side in pixels")
        self.task = task
        self.environment = _made(settings, task.name)
        self._settings, self._size, self._cameras = settings, camera_size, tuple(cameras)
        self._success = _success(settings, task.name)
        self._seed, self._played = 0, list[npt.NDArray[np.float64]]()
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Starts the episode of this seed."""
        self._seed, self._played = seed, []
        self._seen, _ = self.environment.reset(seed=seed)

    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome:
        """Plays one control step; an episode that the environment ends without success is a failure.

        Args:
            action: [A], in the environment's units.

        Raises:
            ValueError: the action has another shape, or is not finite.
        """
        command = np.asarray(action, np.float64)
        if command.shape != (self._settings.action_size,) or not np.isfinite(command).all():
            raise ValueError(f"action {action} is not {self._settings.action_size} finite numbers")
        space = self.environment.action_space
        self._seen, reward, terminated, truncated, info = self.environment.step(command.astype(space.dtype))
        self._played.append(command)
        success = self._success(float(reward), bool(terminated), info)
        return StepOutcome(success, failure=not success and bool(terminated or truncated))

    def observe(self, geometry: bool = False) -> Observation:
        """The pictures that were asked for, and the state. GymError if geometry is wanted: there is no depth."""
        if geometry:
            raise GymError(
                f"{self.task.name} is a Gymnasium environment, which gives no depth; do without geometry"
            )
        return Observation(
            {name: _squeezed(self.picture(name), self._size) for name in self._cameras},
            self.proprio(),
            self.task.phrasings[0],
            self.t,
        )

    def picture(self, camera: str) -> Any:
        """What the environment gives for it, uint8 [H, W, 3] if the settings are right."""
        key = self._settings.cameras[camera]
        return self.environment.render() if key == RENDERED else _at(self._seen, key)

    def proprio(self) -> Numbers:
        """float32 [P]."""
        parts = [np.asarray(_at(self._seen, key), np.float32).ravel() for key in self._settings.state]
        return np.concatenate(parts) if parts else np.zeros(1, np.float32)

    @property
    def t(self) -> int:
        """Control steps since the reset."""
        return len(self._played)

    def joints(self) -> Numbers:
        """float32 [P]: what is known of them is the state."""
        return self.proprio()

    def frame(self, size: int = 256) -> npt.NDArray[np.uint8]:
        """uint8 [size, size, 3], of the first camera."""
        return _squeezed(self.picture(next(iter(self._settings.cameras))), size)

    def state(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """The seed and the actions so far, since environments of all kinds have nothing else in common."""
        played = np.array(self._played).reshape(self.t, self._settings.action_size)
        return {"seed": np.array([self._seed], np.float64), "actions": played}

    def restore(self, state: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Plays the same actions again. ValueError if the state is of another suite."""
        if set(state) != {"seed", "actions"} or state["actions"].shape[1:] != (self._settings.action_size,):
            raise ValueError(f"{sorted(state)} is no state of {self.task.name}; restore one of the same suite")
        self.reset(int(state["seed"][0]))
        for action in state["actions"]:
            self.step(action)

    def expert(self, rng: np.random.Generator) -> Expert:
        """Who solves the episode that begins now. GymError if nobody does, or its function does not exist."""
        named = self._settings.tasks[self.task.name].expert
        if not named:
            raise GymError(f"{self.task.name} has no expert; name one in its settings")
        module, _, function = named.partition(":")
        made: Expert = _function(module, function)(self.environment.unwrapped, rng)
        return made

    def details(self) -> Mapping[str, Any]:
        """Nothing that all environments have."""
        return {}

    def close(self) -> None:
        self.environment.close()


def _made(settings: GymSettings, name: str) -> gymnasium.Env[Any, Any]:
    """The task's environment. GymError says what is missing."""
    task = settings.tasks[name]
    for module in settings.modules:
        _imported(module, f"tasks.{name}: {task.id}")
    arguments = dict(task.arguments)
    if RENDERED in settings.cameras.values():
        arguments.setdefault("render_mode", "rgb_array")
    try:
        return gymnasium.make(task.id, max_episode_steps=-1, disable_env_checker=True, **arguments)
    except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
        known = did_you_mean(task.id, _ids(task.id))
        raise GymError(
            f"tasks.{name}: {task.id!r} is no registered environment ({_first_line(error)}); {known} Name the "
            "module that registers it in `modules`, if another package does"
        ) from None
    except Exception as error:
        raise GymError(
            f"tasks.{name}: {task.id} cannot be made with {arguments} ({_first_line(error)})"
        ) from error


def _ids(wanted: str) -> list[str]:
    """Those of the same namespace if there are some, or else all that are like it."""
    every = list(gymnasium.registry)
    namespace = wanted.rpartition("/")[0]
    return [each for each in every if namespace and each.rpartition("/")[0] == namespace] or every


def _imported(module: str, why: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise GymError(
            f"{why} needs {module}, which {sys.executable} cannot import ({_first_line(error)}); install its "
            "package there, or name another interpreter as `python`"
        ) from None


def _function(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = getattr(_imported(module, f"expert {module}:{name}"), name, None)
    if found is None:
        raise GymError(f"expert is {module}:{name}, and {module} has no such function")
    return found


def _success(settings: GymSettings, name: str) -> Callable[[float, bool, Mapping[str, Any]], bool]:
    rule = settings.success
    if rule.info is not None:
        key = rule.info

        def said(reward: float, terminated: bool, info: Mapping[str, Any]) -> bool:
            if key not in info:
                raise GymError(
                    f"tasks.{name}: info has no {key!r}; it has {', '.join(map(str, info)) or 'nothing'}"
                )
            return bool(info[key])

        return said
    if rule.reward is not None:
        least = rule.reward
        return lambda reward, terminated, info: reward >= least
    return lambda reward, terminated, info: terminated


def _at(seen: Any, key: str) -> Any:
    """What lies under a key. GymError names those that are there."""
    found = seen
    for part in () if key == WHOLE else key.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            raise GymError(f"observations have no {key!r}; they have {', '.join(keys(seen))}")
        found = found[part]
    return found


def keys(seen: Any, prefix: str = "") -> list[str]:
    """The keys of an observation, deeper ones by `/`."""
    if not isinstance(seen, Mapping):
        return [prefix or WHOLE]
    inside = [keys(value, f"{prefix}/{key}" if prefix else str(key)) for key, value in seen.items()]
    return [*chain(*inside)]


def _squeezed(picture: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    if picture.shape == (size, size, 3):
        return np.ascontiguousarray(picture)
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
