"""A standard: how one dataset's recorded episodes become the episodes that policies train on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ipvla.contract import GRIPPERS, Contract, Gripper
from ipvla.contract import Pictures as PictureTerms
from ipvla.data.geometry import EncodedGeometry
from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.data.source import BrokenEpisodeError, DatasetError, Feature, Trajectory


@dataclass(frozen=True)
class EncodedEpisode:
    """An episode as a standard gives it: fields as in `ipvla.types.Episode`, pictures still encoded.

    Attributes:
        pictures: camera name -> T pictures.
        wordings: texts other than `instruction` that steps carry as their task.
        raw_step: int64 [T], the step in the dataset's own episode that each is: standards may leave steps out.
        geometry: camera name -> its geometry at all recorded steps, of those cameras that have some.
    """

    task: str
    family: str
    instruction: str
    seed: int
    pictures: Mapping[str, Pictures]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    raw_step: npt.NDArray[np.int64]
    reasoning: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    wordings: tuple[str, ...] = ()
    geometry: Mapping[str, EncodedGeometry] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)

    @property
    def nbytes(self) -> int:
        pictures = sum(pictures.nbytes for pictures in self.pictures.values())
        pictures += sum(geometry.nbytes for geometry in self.geometry.values())
        recorded = (self.reasoning, self.questions, self.answers)
        texts = sum(8 * len(each) + sum(len(text) for text in set(each)) for each in recorded)
        return pictures + self.state.nbytes + self.action.nbytes + self.raw_step.nbytes + texts

    def image(self, t: int, camera: str) -> npt.NDArray[np.uint8]:
        """Decodes one frame to uint8 [H, W, 3] RGB; an unknown camera or a broken image is a ValueError."""
        if camera not in self.pictures:
            raise ValueError(f"no camera {camera!r} in the dataset; it has {sorted(self.pictures)}")
        pictures, step = self.pictures[camera], int(self.raw_step[t])
        try:
            if isinstance(pictures, EncodedPictures) and pictures.bits(step) > 8:
                raise ValueError("it has 16 bits per channel: depth, which is no camera's picture; leave it out")
            return pictures.decode(step)
        except ValueError as error:
            raise ValueError(
                f"the {camera!r} image at step {self.raw_step[t]} of a {self.task!r} episode cannot be decoded: "
                f"{error}"
            ) from None


#: Norm of a hand's motion below which it stands still, in the action's units.
THRESHOLD = 1e-4


def moving_steps(action: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """bool [T], False where the hand stands still and the gripper is as in the last step that stays.

    Steps before the hand first moves are left out, whatever the gripper does. The definition is OpenVLA-OFT's
    (github.com/moojink/openvla-oft, experiments/robot/libero/regenerate_libero_dataset.py), which replayed
    the remaining actions in a simulator; recorded pictures still show the scene at the time of the recording.

    Args:
        action: float32 [T, A], unnormalised; the last dimension is the gripper.
    """
    moves = np.linalg.norm(action[:, :-1], axis=1) >= THRESHOLD
    # A step that is left out has the gripper of the one before it: comparing neighbours suffices.
    changes = np.diff(action[:, -1], prepend=action[:1, -1]) != 0
    started = np.logical_or.accumulate(moves)
    return np.asarray((moves | changes) & started)


FloatArray: TypeAlias = npt.NDArray[np.float32]

#: Of a hand's motion (6) and its gripper: the gripper alone is not normalised, and it alone is absolute.
HAND_NORMALISED = (True,) * 6 + (False,)
HAND_ABSOLUTE = (False,) * 6 + (True,)


@dataclass(frozen=True)
class Standard(ABC):
    """What a family of datasets defines: by default numbers as recorded, side by side.

    Attributes:
        name: the dataset's.
        cameras: name of each view -> the step feature that holds its pictures.
        language: the step feature that holds the task in words, or the metadata of that name.
        normalised: bool [A], action dimensions that are normalised (OpenVLA's `action_normalization_mask`).
        absolute: bool [A], action dimensions that give a position rather than a motion, and so repeat past an
            episode's end (OpenVLA's `absolute_action_mask`).
        gripper: how the last action dimension encodes the gripper.
        trimmed: how many steps are left out at an episode's start and at its end.
        skip_noops: leave out steps that do nothing, by `moving_steps`.
    """

    name: str
    cameras: Mapping[str, str]
    language: str = "language_instruction"
    normalised: tuple[bool, ...] = HAND_NORMALISED
    absolute: tuple[bool, ...] = HAND_ABSOLUTE
    gripper: Gripper = "environment"
    trimmed: tuple[int, int] = (0, 0)
    skip_noops: bool = False

    def __post_init__(self) -> None:
        if not self.cameras:
            raise ValueError(f"standard {self.name!r} has no cameras; name at least one")
        if len(self.normalised) != len(self.absolute) or not self.normalised:
            raise ValueError(
                f"standard {self.name!r} has normalised for {len(self.normalised)} action dimensions and absolute "
                f"for {len(self.absolute)}; give both one value per dimension"
            )
        if self.gripper not in GRIPPERS:
            raise ValueError(f"gripper is {self.gripper!r}; choose one of {', '.join(GRIPPERS)}")
        if min(self.trimmed) < 0:
            raise ValueError(f"trimmed is {self.trimmed}; give two numbers of steps, 0 or more")

    @property
    @abstractmethod
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The step features of numbers that `action` reads, and those that `state` reads."""

    def action(self, trajectory: Trajectory) -> FloatArray:
        """Actions of all T recorded steps, float32 [T, A], in the dataset's units; of trimmed ones anything."""
        return concatenated(trajectory, self.paths[0])

    def state(self, trajectory: Trajectory) -> FloatArray:
        """Proprioception of all T recorded steps, float32 [T, P], in the dataset's units."""
        return concatenated(trajectory, self.paths[1])

    def contract(self, state_size: int) -> Contract:
        """On which terms its episodes were recorded, as far as the family of datasets defines them.

        Args:
            state_size: P.
        """
        return Contract(
            tuple(sorted(self.cameras)),
            PictureTerms("unknown"),
            gripper=self.gripper,
            action="unknown",
            action_size=len(self.normalised),
            clipped=False,
            state="unknown",
            state_size=state_size,
            control_hz=None,
        )

    @property
    def known_length(self) -> bool:
        """Whether an episode's length follows from the recorded one, without reading the episode."""
        return not self.skip_noops

    def missing(self, features: Mapping[str, Feature]) -> tuple[str, ...]:
        """The step features that it needs and `features` lacks, sorted."""
        return tuple(sorted({*self.cameras.values(), *self.paths[0], *self.paths[1]} - set(features)))

    def settings(self) -> dict[str, Any]:
        """All that its episodes depend on, as JSON values."""
        return {"standard": type(self).__name__, **asdict(self)}

    def episode(self, trajectory: Trajectory) -> EncodedEpisode:
        """The steps that stay, pictures as they are.

        Raises:
            DatasetError: a feature is missing, or actions are not of A dimensions.
            BrokenEpisodeError: a number is not finite, or no step is left.
        """
        action, state = self.action(trajectory), self.state(trajectory)
        if action.shape != (len(trajectory), len(self.normalised)):
            raise DatasetError(
                f"{trajectory.where}: actions are {list(action.shape)}, the standard {self.name!r} has them as "
                f"{[len(trajectory), len(self.normalised)]}; configure one for this dataset"
            )
        steps = self._steps(action, trajectory)
        if not (np.isfinite(action[steps]).all() and np.isfinite(state[steps]).all()):
            raise BrokenEpisodeError(f"{trajectory.where} has actions or states that are not finite; leave it out")
        metadata = trajectory.metadata
        instruction = self._instruction(trajectory)
        return EncodedEpisode(
            task=str(metadata.get("task", instruction)),
            family=str(metadata.get("family", "")),
            instruction=instruction,
            seed=_seed(metadata.get("seed")),
            pictures={camera: trajectory.pictures(path) for camera, path in self.cameras.items()},
            state=state[steps],
            action=action[steps],
            raw_step=steps,
            wordings=self._wordings(trajectory, instruction),
            geometry={
                camera: geometry
                for camera, path in self.cameras.items()
                if (geometry := EncodedGeometry.of(trajectory, path)) is not None
            },
            **{field: tuple(_rows(trajectory.texts(path), steps)) for field, path in _RECORDED.items()},
        )

    def _steps(self, action: FloatArray, trajectory: Trajectory) -> npt.NDArray[np.int64]:
        first, last = self.trimmed
        steps = np.arange(first, len(action) - last, dtype=np.int64)
        if self.skip_noops:
            steps = steps[moving_steps(action[steps])]
        if not len(steps):
            raise BrokenEpisodeError(
                f"{trajectory.where}: of {len(action)} steps the standard {self.name!r} keeps none; leave it out"
            )
        return steps

    def _instruction(self, trajectory: Trajectory) -> str:
        if self.language in trajectory.steps:
            return next((text for text in trajectory.texts(self.language) if text), "")
        return str(trajectory.metadata.get(self.language, ""))

    def _wordings(self, trajectory: Trajectory, instruction: str) -> tuple[str, ...]:
        texts = trajectory.texts(self.language) if self.language in trajectory.steps else ()
        return tuple(text for text in dict.fromkeys(texts) if text and text != instruction)


#: Fields of an episode and the step features that record them; datasets of other hands have none.
_RECORDED = {"reasoning": "reasoning", "questions": "question", "answers": "answer"}


def _rows(texts: tuple[str, ...], steps: npt.NDArray[np.int64]) -> Iterator[str]:
    return (texts[t] for t in steps.tolist()) if texts else iter(())


def _seed(value: Any) -> int:
    """Other programs keep something else under this name."""
    return int(value) if isinstance(value, int | np.integer) else -1


def concatenated(trajectory: Trajectory, paths: tuple[str, ...]) -> FloatArray:
    """Features of numbers side by side, float32 [T, D]; scalars of a step are one column."""
    columns = [trajectory.numbers(path) for path in paths]
    return np.concatenate([np.asarray(c, np.float32).reshape(len(c), -1) for c in columns], axis=1)


def padded_before_gripper(state: FloatArray) -> FloatArray:
    """float32 [T, P] -> [T, P + 1] with a 0 between the pose's six numbers and the gripper, as OpenVLA has it."""
    return np.insert(state, 6, 0, axis=1)
