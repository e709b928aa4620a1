"""What every format of a dataset gives: its episodes by index, under the dataset's own names of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import fsspec
import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import Pictures

#: One row per control step: numbers [T, ...], T texts, or T pictures.
Steps: TypeAlias = "npt.NDArray[Any] | tuple[str, ...] | Pictures"


class DatasetError(ValueError):
    """A dataset is missing, damaged, or not what was asked for; the message names it and a remedy."""


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
        dtype: NumPy's name of it.
    """

    kind: Literal["image", "text", "number"]
    shape: tuple[int, ...] = ()
    dtype: str = "float32"


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


class EpisodeSource(Protocol):
    """The episodes of one dataset on disk or in object storage; safe to use from several threads.

    Attributes:
        name: the dataset's.
        location: directory or address, for messages.
        features: of the steps, by path as in `Trajectory.steps`.
        lengths: int64 [E], control steps per episode, each at least 1.
        tasks: one text per episode that says which task it is of.
        families: one text per episode, "" where the dataset knows no families.
    """

    @property
    def name(self) -> str: ...
    @property
    def location(self) -> str: ...
    @property
    def features(self) -> Mapping[str, Feature]: ...
    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def families(self) -> tuple[str, ...]: ...

    def trajectory(self, index: int) -> Trajectory:
        """Episode `index`. BrokenEpisodeError if it cannot be read, IndexError outside [0, E)."""
        ...
