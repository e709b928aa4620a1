"""What every format of a dataset gives: its episodes by index, under the dataset's own names of features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import fsspec
import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.files import HEAD, foreign

#: One row per control step: numbers [T, ...], T texts, or T pictures.
Steps: TypeAlias = "npt.NDArray[Any] | tuple[str, ...] | Pictures"

_COLOUR_BITS = 8


class DatasetError(ValueError):
    """A dataset is missing, damaged, or not what was asked for; the message names it and a remedy."""


def require_content(path: str, begins: bytes) -> None:
    """DatasetError if a file that begins so is of another kind: what Git LFS leaves in its place, say."""
    if what := foreign(begins):
        raise DatasetError(f"{path} cannot be read: {what}")


def refuse_foreign(location: str) -> None:
    """DatasetError if what cannot be read is no file, or one of another kind."""
    files, path = file_system(location)
    if files.isdir(path):
        raise DatasetError(f"{location} is a directory, and a file of the dataset belongs there; copy it again")
    if files.exists(path):
        require_content(location, files.read_block(path, 0, HEAD))


class BrokenEpisodeError(DatasetError):
    """One episode cannot be read, others may: the message names dataset, shard and episode."""


def file_system(location: str) -> tuple[Any, str]:
    """The file system of a path or address, and the path in it.

    Raises:
        DatasetError: there is no such protocol, or its package is not installed.
    """
    try:
        files, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:  # fsspec says which package is missing
        raise DatasetError(f"{location} cannot be reached: {error}") from None
    return files, str(path)


@dataclass(frozen=True)
class Feature:
    """What one feature of a step holds.

    Attributes:
        kind: "image" (encoded or video), "text" or "number".
        shape: of one step's value, () for a scalar or a text, [H, W, 3] for an image; 0 where it varies.
        dtype: NumPy's name of it; an image that is not uint8 holds no colours, but depth.
    """

    kind: Literal["image", "text", "number"]
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def is_depth(self) -> bool:
        return self.kind == "image" and self.dtype != "uint8"

    @property
    def is_camera(self) -> bool:
        """Whether a policy can look at it."""
        return self.kind == "image" and not self.is_depth


@dataclass(frozen=True)
class Trajectory:
    """One recorded episode of T control steps as its dataset has it.

    Attributes:
        steps: by path; parts are joined with "/" for RLDS ("observation/image_0", "action"), and for LeRobot they
            are as they are ("observation.images.front").
        metadata: of the whole episode, by path without "episode_metadata/"; texts are decoded.
        where: dataset, shard and episode in words, for messages.
    """

    steps: Mapping[str, Steps]
    where: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.steps.values())))

    def numbers(self, path: str) -> npt.NDArray[Any]:
        """A feature of numbers, [T, ...]. DatasetError if there is none of that name, or it is none."""
        values = self._feature(path)
        if not isinstance(values, np.ndarray):
            raise DatasetError(f"{self.where}: step feature {path!r} holds no numbers")
        return values

    def texts(self, path: str) -> tuple[str, ...]:
        """T texts; () if there is no such feature, or nothing was recorded in it."""
        values = self.steps.get(path, ())
        if not isinstance(values, tuple):
            raise DatasetError(f"{self.where}: step feature {path!r} holds no text")
        return values if any(values) else ()

    def pictures(self, path: str) -> Pictures:
        """T pictures. DatasetError if there is no such feature, or it has none."""
        values = self._feature(path)
        if isinstance(values, np.ndarray | tuple):
            raise DatasetError(f"{self.where}: step feature {path!r} holds no pictures")
        return values

    def _feature(self, path: str) -> Steps:
        if path not in self.steps:
            raise DatasetError(f"{self.where}: there is no step feature {path!r}; it has {sorted(self.steps)}")
        return self.steps[path]


class EpisodeSource(ABC):
    """The episodes of one dataset on disk or in object storage; safe to use from several threads.

    Attributes:
        name: the dataset's; of RLDS that of its directory, `NAME/1.0.0`.
        inner_name: what its metadata call it, which published datasets have otherwise than their directory.
        location: directory or address, for messages.
        format: of the dataset and its records, in words.
        fps: control steps per second; None where the dataset does not say.
        features: of the steps, by path as in `Trajectory.steps`.
        lengths: int64 [E], control steps per episode, each at least 1.
        tasks: one text per episode that says which task it is of.
        families: one text per episode, "" where the dataset knows no families.
        broken: what was wrong with each episode that was left out at opening.
    """

    name: str
    inner_name: str
    location: str
    format: str
    fps: float | None = None
    features: Mapping[str, Feature]
    lengths: npt.NDArray[np.int64]
    tasks: tuple[str, ...]
    families: tuple[str, ...]
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def trajectory(self, index: int) -> Trajectory:
        """Episode `index`. BrokenEpisodeError if it cannot be read, IndexError outside [0, E)."""
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} is outside the {len(self)} episodes of {self.location}")
        return self._trajectory(index)

    @abstractmethod
    def _trajectory(self, index: int) -> Trajectory: ...


def feature_of(values: Steps) -> Feature:
    """What the feature is that has these values. ValueError if they are pictures that cannot be decoded."""
    if isinstance(values, np.ndarray):
        return Feature("number", values.shape[1:], values.dtype.name)
    if isinstance(values, tuple):
        return Feature("text", (), "str")
    deep = isinstance(values, EncodedPictures) and values.bits(0) > _COLOUR_BITS
    return Feature("image", values.decode(0).shape, "uint16" if deep else "uint8")


def picture_shape(pictures: Pictures, feature: Feature) -> tuple[int, ...]:
    """Of the first one, [H, W, 3], or [H, W, 1] of depth. ValueError if it cannot be decoded."""
    if feature.is_depth and isinstance(pictures, EncodedPictures) and pictures.bits(0) > _COLOUR_BITS:
        return (*pictures.depth(0).shape, 1)
    return pictures.decode(0).shape
