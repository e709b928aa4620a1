"""A file that makes any Gymnasium environment a suite: its tasks, and on which terms they are played."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeVar

from ipvla.choices import did_you_mean
from ipvla.contract import Action, Contract, Gripper
from ipvla.sim.simulator import Task

#: How a suite's name begins that is such a file: `gym:PATH.yaml`.
PREFIX: Final = "gym:"
#: In place of an observation's key: the picture that `render` draws.
RENDERED: Final = "render"
#: In place of an observation's key: the observation itself, where it is no dictionary.
WHOLE: Final = "."
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
Settings = TypeVar("Settings")


class GymError(ValueError):
    """An environment cannot be played as its settings say."""


@dataclass(frozen=True)
class SuccessSettings:
    """What makes an episode a success: exactly one of these.

    Attributes:
        info: the key of `info` that says so, which is there at every step.
        terminated: the environment ends episodes by success alone.
        reward: a step's reward of at least so much.
    """

    info: str | None = None
    terminated: bool = False
    reward: float | None = None

    def __post_init__(self) -> None:
        _require(self, info=(str, type(None)), terminated=(bool,), reward=(int, float, type(None)))
        if [self.info is not None, self.terminated, self.reward is not None].count(True) != 1:
            raise GymError("give exactly one of info: KEY, terminated: true, reward: NUMBER")


@dataclass(frozen=True)
class GymTask:
    """One task.

    Attributes:
        id: the environment's registered name.
        instruction: the task in words.
        horizon: control steps until an episode counts as timed out; the registered limit does not matter.
        arguments: of the environment's constructor.
        expert: `MODULE:FUNCTION`, which gets the environment at the start of an episode, unwrapped, and a
            `numpy.random.Generator`, and returns an `ipvla.sim.demonstration.Expert`; empty if nobody solves it.
        chance: success probability of a policy that acts at random, in [0, 1].
    """

    id: str
    instruction: str
    horizon: int
    arguments: dict[str, Any] = field(default_factory=dict)
    expert: str = ""
    chance: float = 0.0

    def __post_init__(self) -> None:
        _require(self, id=(str,), instruction=(str,), horizon=(int,), arguments=(dict,), expert=(str,))
        if self.horizon < 1:
            raise GymError(f"horizon is {self.horizon}; give control steps, 1 or more")
        if self.expert and not re.fullmatch(r"[\w.]+:\w+", self.expert):
            raise GymError(f"expert is {self.expert!r}; write MODULE:FUNCTION")


@dataclass(frozen=True)
class GymSettings:
    """A suite of Gymnasium environments on the same terms.

    Keys of observations name what lies deeper by `/`, as in `pixels/top`; `.` is the observation itself.

    Attributes:
        tasks: name -> task.
        cameras: name of each view -> the observation's key, or `render` for what the environment's `render`
            draws. Pictures count as upright; those that are not square are squeezed.
        state: the observation's keys of numbers that are the proprioception, side by side; without any it is a 0.
        action: what an action means, see `ipvla.contract.Action`.
        action_size, state_size: A and P.
        control_hz: control steps per second.
        success: what a success is.
        gripper: what an action's last number means, see `ipvla.contract.Gripper`.
        clipped: what a policy says is clipped to [-1, 1].
        replayable: a seed and the same actions lead to the same episode.
        modules: imported before the environment is made, to register it.
        packages: distribution packages whose versions results depend on; gymnasium's is always recorded.
        python: the interpreter of an environment of its own, for packages that conflict with this project's; it
            needs Ray and the Python version of this one. Empty for this one.
    """

    tasks: Mapping[str, GymTask]
    cameras: dict[str, str]
    action_size: int
    state_size: int
    control_hz: float
    success: SuccessSettings
    state: tuple[str, ...] = ()
    action: Action = "other"
    gripper: Gripper = "none"
    clipped: bool = False
    replayable: bool = True
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    python: str = ""

    def __post_init__(self) -> None:
        _require(self, tasks=(dict,), cameras=(dict,), action_size=(int,), state_size=(int,), python=(str,))
        _require(self, control_hz=(int, float), clipped=(bool,), replayable=(bool,))
        if not self.tasks:
            raise GymError("tasks is empty; name at least one")
        for name in self.tasks:
            if not _NAME.fullmatch(name):
                raise GymError(f"{name!r} is no name of a task; use letters, digits, _ and -")
        if not self.cameras:
            raise GymError("cameras is empty; name at least one, for example {front: render}")
        if not self.state and self.state_size != 1:
            raise GymError(f"state_size is {self.state_size} without any key of state; name keys, or make it 1")
        _ = self.contract

    @property
    def contract(self) -> Contract:
        """On which terms the environments exchange observations and actions."""
        return Contract(
            tuple(self.cameras),
            gripper=self.gripper,
            action=self.action,
            action_size=self.action_size,
            clipped=self.clipped,
            state="other",
            state_size=self.state_size,
            control_hz=float(self.control_hz),
        )

    def listed(self) -> tuple[Task, ...]:
        """The tasks, each a family of its own."""
        return tuple(
            Task(name, name, (task.instruction,), task.horizon, task.chance) for name, task in self.tasks.items()
        )

    def to_json(self) -> str:
        """One line, the same for the same settings."""
        return json.dumps(asdict(self), sort_keys=True)

    def played(self) -> str:
        """The same without what does not decide how an episode goes, the interpreter's path."""
        return replace(self, python="").to_json()

    @property
    def version(self) -> str:
        """Twelve characters that settings of other episodes do not have."""
        return sha256(self.played().encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GymSettings:
        """From what a file, or `to_json`, holds. GymError if that is no such settings."""
        given = dict(values) if isinstance(values, Mapping) else {}
        if isinstance(tasks := given.get("tasks"), Mapping):
            given["tasks"] = {str(name): _built(GymTask, task, f"tasks.{name}") for name, task in tasks.items()}
        if "success" in given:
            given["success"] = _built(SuccessSettings, given["success"], "success")
        for name in ("state", "modules", "packages"):
            if name in given:
                given[name] = _texts(name, given[name])
        return _built(cls, given, "")

    @classmethod
    def load(cls, path: Path) -> GymSettings:
        """From a YAML file. GymError if there is none, or it holds no such settings."""
        from ipvla import plain_yaml  # an environment of its own may lack YAML

        try:
            return cls.from_dict(plain_yaml.load_file(path.expanduser()))
        except OSError as error:
            raise GymError(
                f"{path}: {error.strerror}; give the file of an environment, {PREFIX}PATH.yaml"
            ) from None
        except ValueError as error:
            raise GymError(f"{path}: {' '.join(str(error).split())}") from None


def suite_name(path: Path) -> str:
    """What the suite of a file is called. GymError if results could not be filed under it."""
    if not _NAME.fullmatch(path.stem):
        raise GymError(f"{path}: the file's name names the suite; use letters, digits, _ and - for it")
    return path.stem


def _built(kind: type[Settings], values: Any, where: str) -> Settings:
    """The settings of this class with these values. GymError names the setting that is wrong."""
    at = f"{where}: " if where else ""
    if not isinstance(values, Mapping) or not values:
        raise GymError(f"{at}this is no mapping of settings: {values!r:.80}")
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise GymError(f"{at}{name!r} is no setting; {did_you_mean(str(name), known)}")
    needed = [n for n, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise GymError(f"{at}{', '.join(missing)} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise GymError(f"{at}{error}") from None


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise GymError(f"{name} is {values!r:.80}; give a list of names, for example [{name}]")
    return tuple(values)


def _require(settings: Any, **kinds: tuple[type, ...]) -> None:
    for name, allowed in kinds.items():
        value = getattr(settings, name)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise GymError(f"{name} is {value!r:.80}; give {' or '.join(_KINDS[kind] for kind in allowed)}")


_KINDS: Final = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    type(None): "null",
}
