"""The data's half of the transforms: units of states and actions, cameras, chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from ipvla.contract import (
    GRIPPERS,
    HAND,
    STATE_SIZES,
    Contract,
    Gripper,
    Pictures,
    environment_gripper,
    from_environment,
)
from ipvla.data.fitting import Fitting
from ipvla.data.geometry import PointTerms
from ipvla.data.normalisation import NORMALISATIONS, Normalisation
from ipvla.data.statistics import Statistics
from ipvla.types import Observation

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

#: What a chunk of actions holds past its episode's end.
#: "mask": the last action repeats and is no target. "openvla": absolute dimensions repeat, relative ones become 0,
#: and all are targets. "truncate": a chunk that reaches past the end has no targets at all.
PastEnd: TypeAlias = Literal["mask", "openvla", "truncate"]
PAST_END: Final[tuple[str, ...]] = get_args(PastEnd)


@dataclass(frozen=True)
class Conventions:
    """What the data and their settings fix, whatever the backbone is.

    Attributes:
        statistics: of the training data; all P proprioception and A action dimensions.
        cameras: names, in the order of the view axis V.
        image_size: height and width that the backbone is built for, pixels; other frames are made so by `fitting`.
            0 leaves frames as they come, all of one size, to a backbone that takes any.
        chunk: C, actions per target.
        proprio_index: the proprioception columns the model sees, None for all.
        normalisation: of actions and proprioception.
        past_end: what a chunk holds past its episode's end.
        absolute: bool [A], action dimensions that give a position rather than a motion; None for the last
            alone, the gripper.
        gripper: how the statistics' dataset encodes the gripper.
        recorded: on which terms the training data were recorded; None for those that `assumed_contract` takes.
        mixed: statistics of every dataset of a mixture, by its name; `of` gives the conventions with one of them.
        fitting: how frames of another size get this one.
        relative_actions: bool of each of the first numbers of an action, True where the model has it relative to
            the same number of the state at the chunk's first control step (openpi's DeltaActions); the statistics
            are then those of the difference. () for none.
        points: how points are made of depth, for a model with fusion; None for pictures alone.
    """

    statistics: Statistics
    cameras: tuple[str, ...]
    image_size: int
    chunk: int
    proprio_index: tuple[int, ...] | None = None
    normalisation: Normalisation = "bounds_q99"
    past_end: PastEnd = "mask"
    absolute: tuple[bool, ...] | None = None
    gripper: Gripper = "environment"
    recorded: Contract | None = None
    mixed: Mapping[str, Statistics] = field(default_factory=dict)
    fitting: Fitting = field(default_factory=Fitting)
    relative_actions: tuple[bool, ...] = ()
    points: PointTerms | None = None

    def __post_init__(self) -> None:
        for name, least in (("image_size", 0), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to at least {least}")
        if not self.cameras:
            raise ValueError("cameras is empty; name at least one, e.g. ('agentview',)")
        known = self.statistics.proprio.dim
        if self.proprio_index is not None and not all(0 <= i < known for i in self.proprio_index):
            raise ValueError(f"proprio_index {self.proprio_index} leaves the {known} columns; use 0..{known - 1}")
        choices = {"normalisation": NORMALISATIONS, "past_end": PAST_END, "gripper": GRIPPERS}
        for name, known_values in choices.items():
            if getattr(self, name) not in known_values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known_values)}")
        self.statistics.action.require(self.normalisation)
        self.statistics.proprio.require(self.normalisation)
        if (recorded := self.recorded) is not None:
            sizes = (recorded.action_size, recorded.state_size)
            if sizes != (self.action_dim, known) or recorded.gripper != self.gripper:
                raise ValueError(
                    f"recorded has actions and states of {sizes} numbers and gripper {recorded.gripper!r}, the "
                    f"statistics {(self.action_dim, known)} and gripper is {self.gripper!r}; give those of one "
                    "dataset"
                )
        if self.absolute is not None and len(self.absolute) != self.action_dim:
            raise ValueError(
                f"absolute has {len(self.absolute)} values for {self.action_dim} action dimensions; give one each"
            )
        if len(self.relative_actions) > (most := min(self.action_dim, known)):
            raise ValueError(
                f"relative_actions has {len(self.relative_actions)} values for actions of {self.action_dim} "
                f"numbers and states of {known}; give at most {most}"
            )
        if self.gripper != "none" and any(self.relative_actions[self.action_dim - 1 :]):
            raise ValueError(
                f"relative_actions is true of number {self.action_dim}, which is the gripper; leave it out, or "
                "say that there is none (gripper: none)"
            )

    @property
    def action_dim(self) -> int:
        return self.statistics.action.dim

    @property
    def proprio_dim(self) -> int:
        return self.statistics.proprio.dim if self.proprio_index is None else len(self.proprio_index)

    @property
    def contract(self) -> Contract:
        """On which terms the training data were recorded, with the cameras that the model looks through."""
        recorded = self.recorded or assumed_contract(self.gripper, self.action_dim, self.statistics.proprio.dim)
        state = {"state": "none"} if self.proprio_index == () else {}
        geometry = self.points is not None
        return replace(recorded, cameras=self.cameras, geometry=geometry, **state)  # type: ignore[arg-type]

    def of(self, dataset: str) -> Self:
        """Those of one dataset of a mixture, or the only ones. ValueError if it is not in the mixture."""
        if not self.mixed:
            return self
        if dataset not in self.mixed:
            raise ValueError(f"dataset {dataset!r} is not in the mixture; choose among {', '.join(self.mixed)}")
        statistics = self.mixed[dataset]
        recorded = self.recorded and replace(self.recorded, state_size=statistics.proprio.dim)
        return replace(self, statistics=statistics, recorded=recorded)

    def proprio(self, observations: Sequence[Observation]) -> torch.Tensor:
        """What the model sees of their proprioception, normalised: float32 [B, P]."""
        if self.proprio_index == ():
            return torch.zeros(len(observations), 0)
        states = np.stack([o.proprio for o in observations]).astype(np.float32)
        proprio = self.statistics.proprio.normalise(states, self.normalisation)
        if self.proprio_index is not None:
            proprio = proprio[:, list(self.proprio_index)]
        return torch.from_numpy(proprio)

    def images(self, observations: Sequence[Observation]) -> torch.Tensor:
        """Their pictures, uint8 [B, V, H, W, 3]. ValueError for a missing camera, or sizes that differ."""
        views = [[self._image(o, camera) for camera in self.cameras] for o in observations]
        if len(sizes := {view.shape[:2] for row in views for view in row}) > 1:
            raise ValueError(f"pictures have the sizes {sorted(sizes)}; set data.image_size, so that they get one")
        return torch.from_numpy(np.stack([np.stack(row) for row in views]))

    def patch_points(self, observations: Sequence[Observation], side: int) -> torch.Tensor:
        """Points float32 [B, V, side, side, 3] of their pictures' patches, in metres, NaN where unknown.

        Raises:
            ValueError: a picture has no geometry, or `fitting` cuts or pads it.
        """
        terms = self.points or PointTerms()
        rows = []
        for observation in observations:
            seen = observation.geometry or {}
            if lacking := [camera for camera in self.cameras if camera not in seen]:
                raise ValueError(
                    f"model.fusion reads depth, and observations have none of {', '.join(lacking)}; give them "
                    "geometry"
                )
            if self.fitting.shape != "stretch" and any(len(set(one.depth.shape)) > 1 for one in seen.values()):
                raise ValueError(
                    f"pictures fit by {self.fitting.shape!r}, points only by 'stretch'; make them square"
                )
            rows.append(np.stack([terms.applied(seen[camera]).points(side) for camera in self.cameras]))
        return torch.from_numpy(np.stack(rows))

    def resized(self, observation: Observation) -> Observation:
        """The same with the model's pictures alone, at its size. ValueError for a missing camera."""
        return replace(observation, images={camera: self._image(observation, camera) for camera in self.cameras})

    def chunk_targets(
        self, action: FloatArray, t: int | IntArray, state: FloatArray | None = None
    ) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """The next `chunk` actions from control step(s) `t` of one episode.

        Args:
            action: float32 [T, A], the episode's actions in environment units.
            t: control steps, any shape [...], in [0, T).
            state: float32 [T, P], its states, which `relative_actions` need.

        Returns:
            float32 [..., C, A], normalised; and bool [..., C], True where it is a target. What they are past the
            end is `past_end`'s to say: by default the last action repeats there and is no target.
        """
        steps = np.asarray(t)[..., None] + np.arange(self.chunk)
        recorded = action[np.minimum(steps, len(action) - 1)]
        if self.relative_actions:
            recorded = recorded - self._base(None if state is None else state[np.asarray(t)])
        target = self.statistics.action.normalise(recorded, self.normalisation)
        absolute = self.absolute or (False,) * (self.action_dim - 1) + (True,)
        return past_the_end(target, steps < len(action), self.past_end, absolute)

    def normalise(self, actions: FloatArray, state: FloatArray | None = None) -> FloatArray:
        """Actions [..., C, A] in environment units as the model has them, float32; undone by `denormalise`."""
        recorded = from_environment(actions, self.gripper)
        if self.relative_actions:
            recorded = recorded - self._base(state)
        return self.statistics.action.normalise(recorded, self.normalisation).astype(np.float32)

    def denormalise(
        self, actions: npt.NDArray[np.floating[Any]] | torch.Tensor, state: FloatArray | None = None
    ) -> FloatArray:
        """Model output [..., C, A] to environment units, float32; with states [..., P] for `relative_actions`.

        A hand's motion lies within [-1, 1]; other actions stay in the dataset's units, unclipped. The gripper is
        exactly -1 (open) or +1 (closed), whatever the dataset's convention, if the last dimension is one. What is
        not finite becomes NaN, so that no clipping hides it.
        """
        y = actions.detach().float().cpu().numpy() if isinstance(actions, torch.Tensor) else actions
        y = np.where(np.isfinite(y), y, np.float32(np.nan)).astype(np.float32)
        x = self.statistics.action.denormalise(y, self.normalisation)
        if self.relative_actions:
            x = (x + self._base(state)).astype(np.float32)
        if self.contract.clipped:
            x = x.clip(-1, 1)
        if self.gripper != "none":
            x[..., -1] = environment_gripper(x[..., -1], self.gripper)
        x[np.isnan(y)] = np.nan
        return x

    def _base(self, state: FloatArray | None) -> FloatArray:
        """What actions are relative to: of states [..., P] the numbers that count, float32 [..., 1, A]."""
        if state is None:
            raise ValueError("actions are relative to the state, and no state is given; give the chunk's first")
        count = len(self.relative_actions)
        base = np.zeros((*state.shape[:-1], 1, self.action_dim), np.float32)
        base[..., 0, :count] = np.where(self.relative_actions, state[..., :count], 0)
        return base

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "statistics": self.statistics.to_dict(),
            "cameras": list(self.cameras),
            "image_size": self.image_size,
            "chunk": self.chunk,
            "proprio_index": None if self.proprio_index is None else list(self.proprio_index),
            "normalisation": self.normalisation,
            "past_end": self.past_end,
            "absolute": None if self.absolute is None else list(self.absolute),
            "gripper": self.gripper,
            "contract": self.contract.to_dict(),
            **({"mixed": {name: one.to_dict() for name, one in self.mixed.items()}} if self.mixed else {}),
            **({"fitting": self.fitting.to_dict()} if self.fitting != Fitting() else {}),
            **({"relative_actions": list(self.relative_actions)} if self.relative_actions else {}),
            **({} if self.points is None else {"points": self.points.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, other entries aside; what a setting was before it existed is its default."""
        index, absolute = values["proprio_index"], values.get("absolute")
        return cls(
            statistics=Statistics.from_dict(values["statistics"]),
            cameras=tuple(values["cameras"]),
            image_size=values["image_size"],
            chunk=values["chunk"],
            proprio_index=None if index is None else tuple(index),
            normalisation=values.get("normalisation", "bounds_q99"),
            past_end=values.get("past_end", "mask"),
            absolute=None if absolute is None else tuple(absolute),
            gripper=values.get("gripper", "environment"),
            recorded=Contract.from_dict(values["contract"]) if "contract" in values else None,
            mixed={name: Statistics.from_dict(one) for name, one in values.get("mixed", {}).items()},
            fitting=Fitting.from_dict(values["fitting"]) if "fitting" in values else Fitting(),
            relative_actions=tuple(values.get("relative_actions", ())),
            points=PointTerms.from_dict(values["points"]) if "points" in values else None,
        )

    def _image(self, observation: Observation, camera: str) -> npt.NDArray[np.uint8]:
        if camera not in observation.images:
            raise ValueError(f"no camera {camera!r} in the observation; it has {sorted(observation.images)}")
        picture = observation.images[camera]
        return self.fitting(picture, self.image_size) if self.image_size else picture


def assumed_contract(gripper: Gripper, action_size: int, state_size: int) -> Contract:
    """On which terms the training data were recorded, for a policy that was saved without them.

    With the simulator's own gripper they are taken for this project's own demonstrations (upright, 20 Hz), with
    OpenVLA's for LIBERO as OpenVLA published it (mirrored, 20 Hz), without any for pictures like a protocol's.
    """
    hand = gripper != "none" and action_size == HAND.action_size
    pictures = {"environment": "upright", "open_is_one": "mirrored", "none": "unknown"}
    layouts = [name for name in ("hand", "hand_padded") if STATE_SIZES[name] == state_size]
    return Contract(
        HAND.cameras,
        Pictures(pictures[gripper] if hand else "unknown"),  # type: ignore[arg-type]
        gripper=gripper,
        action="hand" if hand else "unknown",
        action_size=action_size,
        clipped=hand,
        state=layouts[0] if hand and layouts else "unknown",  # type: ignore[arg-type]
        state_size=state_size,
        control_hz=HAND.control_hz if hand else None,
    )


def past_the_end(
    target: npt.NDArray[np.float32],
    inside: npt.NDArray[np.bool_],
    how: PastEnd,
    absolute: tuple[bool, ...],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Targets and which of them count.

    "openvla" does what OpenVLA's pipeline does (prismatic/vla/datasets/rlds/traj_transforms.py), which cuts chunks
    after it has normalised: its 0 is the middle of the normalised range, not a motion of 0. "truncate" does what
    OpenVLA-OFT does, which has no windows at an episode's last C - 1 steps: they are seen but not trained on, and
    an episode shorter than a chunk has no targets.

    Args:
        target: float32 [..., C, A], normalised, the episode's last action past its end.
        inside: bool [..., C], False past the episode's end.
        absolute: bool [A], action dimensions that give a position rather than a motion.

    Returns:
        float32 [..., C, A], and bool [..., C], True where it is a target.
    """
    if how == "openvla":
        stays = inside[..., None] | np.array(absolute)
        return np.where(stays, target, np.float32(0)), np.ones_like(inside)
    if how == "truncate":
        return target, np.broadcast_to(inside[..., -1:], inside.shape)
    return target, inside
