"""What passes between a policy and a world, as a value: pictures, state and actions, and how each is expressed.

A dataset's standard declares the contract that it was recorded in, `policy.json` keeps it, an evaluation protocol
and a served policy state theirs. `fitted` compares two of them and says what is converted, or refuses.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

#: "environment": -1 open, +1 closed, as LIBERO's simulators take it. "open_is_one": 0 closed, 1 open, as OpenVLA's
#: datasets have it. "none": the last dimension is no gripper, or one like all others.
Gripper: TypeAlias = Literal["environment", "open_is_one", "none"]
GRIPPERS: Final[tuple[str, ...]] = get_args(Gripper)
#: "mirrored" is upright with left and right exchanged, as the public scripts get it by rotating LIBERO's pictures
#: by 180 degrees; "upside_down" is as OpenGL gives them.
Orientation: TypeAlias = Literal["upright", "mirrored", "upside_down", "unknown"]
ORIENTATIONS: Final[tuple[str, ...]] = get_args(Orientation)
Resize: TypeAlias = Literal["lanczos", "bilinear"]
#: "hand": robosuite's OSC_POSE, motion of the hand (6) and the gripper, each in [-1, 1]. "joints": joint
#: positions.
Action: TypeAlias = Literal["hand", "joints", "other", "unknown"]
#: "hand": position (3, m), axis-angle (3, rad), finger joints (2, m). "hand_padded": the same with a 0 before the
#: fingers. "joints": arm (7, rad) and fingers (2, m). "none": the policy reads no column of it.
State: TypeAlias = Literal["hand", "hand_padded", "joints", "none", "other", "unknown"]

#: What a world that gives the hand's state can give instead, and the size of each.
STATE_SIZES: Final[Mapping[str, int]] = {"hand": 8, "hand_padded": 9, "joints": 9}
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "gripper": GRIPPERS,
    "action": get_args(Action),
    "state": get_args(State),
}


class ContractError(ValueError):
    """A policy and a world do not fit each other, and nothing converts the one's terms into the other's."""


@dataclass(frozen=True)
class Pictures:
    """How a rendered picture becomes the one that a policy sees.

    Attributes:
        orientation: see `Orientation`.
        jpeg: it goes through JPEG and back (quality 95, chroma halved), as OpenVLA's training data did.
        size: side in pixels; None for as it was rendered.
        resize: the filter by which it gets that size.
        crop_area: share of the area around the centre that is cut out and blown up again, in (0, 1].
    """

    orientation: Orientation = "upright"
    jpeg: bool = False
    size: int | None = None
    resize: Resize = "lanczos"
    crop_area: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("orientation", ORIENTATIONS), ("resize", get_args(Resize))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose among {known}")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area is {self.crop_area}; it must be in (0, 1]")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1")

    def __str__(self) -> str:
        parts = [self.orientation.replace("_", " ")]
        parts += ["JPEG"] if self.jpeg else []
        parts += [f"{self.size} px"] if self.size is not None else []
        parts += [f"crop {self.crop_area:g}"] if self.crop_area < 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Limits:
    """Bounds that actions for a robot are clipped to, a number per dimension; an empty one bounds nothing.

    Attributes:
        low, high: of every action, [A], in its units.
        change: from one control step to the next, [A]; an episode's first action has none before it.
    """

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    change: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("low", "high", "change"):
            if any(np.isnan(value) for value in getattr(self, name)):
                raise ValueError(f"limits.{name} is {list(getattr(self, name))}; give numbers")
        if self.low and self.high and any(a > b for a, b in zip(self.low, self.high, strict=False)):
            raise ValueError(
                f"limits.low is {list(self.low)} and limits.high {list(self.high)}; low must be below"
            )
        if any(value < 0 for value in self.change):
            raise ValueError(f"limits.change is {list(self.change)}; give numbers of at least 0")

    def require(self, action_size: int) -> None:
        """ValueError if they are not those of actions of A numbers."""
        for name in ("low", "high", "change"):
            if (values := getattr(self, name)) and len(values) != action_size:
                raise ValueError(
                    f"limits.{name} has {len(values)} numbers; actions have {action_size}: give one for each"
                )

    def also(self, others: Limits | None) -> Limits:
        """What keeps to both. ValueError if nothing does, or they are of other actions."""
        if others is None:
            return self
        pairs = {name: (getattr(self, name), getattr(others, name)) for name in ("low", "high", "change")}
        tightest = {
            name: tuple(map(max if name == "low" else min, *both)) if all(both) else both[0] or both[1]
            for name, both in pairs.items()
        }
        return Limits(**tightest)

    def kept(
        self, actions: npt.NDArray[np.float32], before: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Finite actions [C, A] within the limits; `before`, [A], was played last, None for an episode's start."""
        within = actions.clip(self.low or -np.inf, self.high or np.inf).astype(np.float32)
        if self.change:
            change = np.array(self.change, np.float32)
            for action in within:
                if before is not None:
                    action[:] = action.clip(before - change, before + change)
                before = action
        return within


@dataclass(frozen=True)
class Contract:
    """The terms on which observations and actions are exchanged.

    Attributes:
        cameras: names of the views.
        pictures: how they are turned and treated.
        gripper: what the last number of an action means.
        action: what the others mean.
        action_size: A.
        clipped: actions are clipped to [-1, 1].
        state: layout of the proprioception.
        state_size: P.
        control_hz: control steps per second; None if nothing tells.
        limits: that a server and a simulator hold actions to; None for no others than `clipped`.
        geometry: depth, intrinsics and pose of every camera: of a policy that it reads them, of a world that it
            gives them to whoever asks.
    """

    cameras: tuple[str, ...]
    pictures: Pictures = field(default_factory=Pictures)
    gripper: Gripper = "environment"
    action: Action = "hand"
    action_size: int = 7
    clipped: bool = True
    state: State = "hand"
    state_size: int = 8
    control_hz: float | None = 20.0
    limits: Limits | None = None
    geometry: bool = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name, least in (("action_size", 1), ("state_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.control_hz is not None and self.control_hz <= 0:
            raise ValueError(f"control_hz is {self.control_hz}; it must be above 0")
        if self.limits is not None:
            self.limits.require(self.action_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; without limits or geometry where there are none."""
        values = {**asdict(self), "cameras": list(self.cameras)}
        if not self.geometry:
            del values["geometry"]
        limits = values.pop("limits")
        return values if limits is None else {**values, "limits": {n: list(v) for n, v in limits.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. ValueError for values that no contract has."""
        try:
            given = {**values, "cameras": tuple(values["cameras"]), "pictures": Pictures(**values["pictures"])}
            if (limits := values.get("limits")) is not None:
                given["limits"] = Limits(**{name: tuple(map(float, one)) for name, one in limits.items()})
            return cls(**given)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{reprlib.repr(values)} is no contract ({error})") from None

    @property
    def in_environment_units(self) -> Self:
        """The same terms with actions as the simulator takes them."""
        return self if self.gripper == "none" else replace(self, gripper="environment")

    @property
    def pictures_alone(self) -> Self:
        """The same terms for a client that reads no geometry."""
        return replace(self, geometry=False)

    def changes(self, base: Contract) -> dict[str, Any]:
        """The fields in which this one differs from `base`, as JSON values; `changed` applies them.

        What `base` gives beyond this one's wishes is no difference: without `geometry` nothing of it is drawn.
        """
        mine, theirs = ({"limits": None, **one.to_dict()} for one in (self, base))
        theirs = {"geometry": False, **theirs}
        return {name: value for name, value in mine.items() if value != theirs[name]}

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """This one with the fields that `changes` names."""
        return type(self).from_dict({**self.to_dict(), **changes})


#: The terms of robosuite's Panda arm under OSC_POSE control: those of LIBERO and of this project's own suites.
HAND: Final = Contract(("agentview", "robot0_eye_in_hand"))
#: The same of their simulators, which give the geometry of pictures.
SIMULATED_HAND: Final = replace(HAND, geometry=True)


def fitted(client: Contract, offered: Contract, name: str = "the policy", world: str = "the world") -> Contract:
    """The terms on which `client` plays where `offered` are the terms.

    - Cameras: the client's, which must be among those offered.
    - Pictures: as offered if they are turned as the client's, or nothing tells how the client's are; else turned
      as the client's and left as rendered, since JPEG, size and crop belong to policies of the other kind.
    - State: the client's layout, if it follows from the one offered.
    - Actions: as the client gives them, if they differ from those offered in the gripper's convention alone.
    - Limits of actions: both sides'.
    - Geometry: for a client that reads it.

    Raises:
        ContractError: something else differs; one line names both sides.
    """
    problems = []
    if lacking := sorted(set(client.cameras) - set(offered.cameras)):
        problems.append(
            f"{name} looks through {', '.join(client.cameras)}, {world} shows {', '.join(offered.cameras)} "
            f"and lacks {', '.join(lacking)}"
        )
    if client.action_size != offered.action_size:
        problems.append(
            f"{name} gives {client.action_size} numbers per action, {world} takes {offered.action_size}"
        )
    elif "unknown" not in (client.action, offered.action) and client.action != offered.action:
        problems.append(f"{name} gives actions of kind {client.action!r}, {world} takes {offered.action!r}")
    state, size = client.state, client.state_size
    if state == "unknown" and size == offered.state_size:
        state = offered.state
    if not _gives_state(offered, state, size):
        problems.append(
            f"{name} reads a state of layout {client.state!r} with {size} numbers, {world} gives "
            f"{offered.state!r} with {offered.state_size}"
        )
    if client.geometry and not offered.geometry:
        problems.append(f"{name} reads depth, which {world} does not give")
    if None not in (client.control_hz, offered.control_hz) and client.control_hz != offered.control_hz:
        problems.append(f"{name} acts at {client.control_hz:g} Hz, {world} runs at {offered.control_hz:g} Hz")
    try:
        limits = _limits(client, offered)
    except ValueError as error:
        problems.append(f"{name} and {world} have limits that exclude each other ({error})")
    if problems:
        raise ContractError(f"{'; '.join(problems)}: choose a policy and a suite that agree")
    same = client.pictures.orientation in ("unknown", offered.pictures.orientation)
    return replace(
        offered,
        cameras=client.cameras,
        pictures=offered.pictures if same else Pictures(client.pictures.orientation),
        gripper=client.gripper,
        state=state,
        state_size=size,
        limits=limits,
        geometry=client.geometry,
    )


def _limits(client: Contract, offered: Contract) -> Limits | None:
    """Both sides', in the client's units: a gripper of another convention is -1 or +1 anyway."""
    theirs = offered.limits
    if theirs is not None and client.gripper != offered.gripper:
        ends = {"low": -np.inf, "high": np.inf, "change": np.inf}
        theirs = Limits(**{n: (*values[:-1], end) for n, end in ends.items() if (values := getattr(theirs, n))})
    return theirs if client.limits is None else client.limits.also(theirs)


def _gives_state(offered: Contract, layout: str, size: int) -> bool:
    if layout == "none" or (layout, size) == (offered.state, offered.state_size):
        return True
    return offered.state in STATE_SIZES and STATE_SIZES.get(layout) == size


def common(contracts: Sequence[Contract]) -> Contract:
    """What the contracts of a mixture's datasets agree in: the first one's, unknown where another differs."""
    first, *others = contracts
    changes: dict[str, Any] = {}
    if any(other.pictures.orientation != first.pictures.orientation for other in others):
        changes["pictures"] = Pictures("unknown")
    if first.geometry and not all(other.geometry for other in others):
        changes["geometry"] = False
    if any(other.control_hz != first.control_hz for other in others):
        changes["control_hz"] = None
    for name in ("action", "state"):
        if any(getattr(other, name) != getattr(first, name) for other in others):
            changes[name] = "unknown"
    return replace(first, **changes)


def environment_gripper(values: npt.NDArray[np.floating[Any]], gripper: Gripper) -> npt.NDArray[np.floating[Any]]:
    """Exactly -1 (open) or +1 (closed), in the dtype of `values` [...], which have one of the two conventions."""
    closed = values > 0 if gripper == "environment" else values < 0.5
    return np.where(closed, values.dtype.type(1), values.dtype.type(-1))


def to_environment(actions: npt.NDArray[np.floating[Any]], gripper: Gripper) -> npt.NDArray[np.floating[Any]]:
    """Actions [..., A] of a client with this gripper, as the simulator takes them."""
    if gripper != "open_is_one":
        return actions
    converted = np.array(actions)
    converted[..., -1] = environment_gripper(converted[..., -1], gripper)
    return converted


def from_environment(actions: npt.NDArray[np.floating[Any]], gripper: Gripper) -> npt.NDArray[np.floating[Any]]:
    """The inverse of `to_environment`, for actions whose gripper is -1 or +1."""
    if gripper != "open_is_one":
        return actions
    converted = np.array(actions)
    converted[..., -1] = (1 - np.sign(converted[..., -1])) / 2
    return converted


def readable_changes(view: Contract, offered: Contract) -> str:
    """In which terms a client plays otherwise than a protocol's own, in words; "" for none."""
    parts = []
    if view.pictures != offered.pictures:
        parts.append(f"pictures {view.pictures} (instead of {offered.pictures})")
    if view.state != offered.state:
        parts.append(f"state {view.state} (instead of {offered.state})")
    return "; ".join(parts)
