"""Whether an episode that was written is the one that was read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.data.source import DatasetError, Trajectory


@dataclass(frozen=True)
class Comparison:
    """What is the same, and how far pictures are apart, over some episodes.

    Attributes:
        episodes, steps: how many were compared.
        actions_sha256: of their actions' bytes, one digest per episode; written and read are equal.
        greatest_difference: of a pixel, in levels of 255.
        total_difference, pixels: the sum of all differences, and of how many values.
    """

    episodes: int
    steps: int
    actions_sha256: tuple[str, ...]
    greatest_difference: int
    total_difference: int
    pixels: int

    @property
    def mean_difference(self) -> float:
        """Of the pixels of all pictures that are not the same file, in levels of 255."""
        return self.total_difference / max(self.pixels, 1)

    @property
    def digest(self) -> str:
        """SHA-256 of all actions' digests, in the order of the episodes."""
        return hashlib.sha256("".join(self.actions_sha256).encode()).hexdigest()

    @classmethod
    def together(cls, comparisons: Sequence[Comparison]) -> Self:
        """Of all their episodes, in this order."""
        return cls(
            episodes=sum(c.episodes for c in comparisons),
            steps=sum(c.steps for c in comparisons),
            actions_sha256=tuple(digest for c in comparisons for digest in c.actions_sha256),
            greatest_difference=max((c.greatest_difference for c in comparisons), default=0),
            total_difference=sum(c.total_difference for c in comparisons),
            pixels=sum(c.pixels for c in comparisons),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, from JSON values."""
        return cls(**values | {"actions_sha256": tuple(values["actions_sha256"])})


def compare(expected: Trajectory, found: Trajectory) -> Comparison:
    """An episode as it was to be written, and as it was read back.

    Raises:
        DatasetError: numbers or texts differ, or there are more or fewer steps.
    """
    if len(expected) != len(found):
        raise DatasetError(f"{expected.where} has {len(expected)} steps and {len(found)} were written")
    greatest = total = pixels = 0
    for name, values in expected.steps.items():
        if isinstance(values, np.ndarray):
            same = np.array_equal(values, found.numbers(name), equal_nan=values.dtype.kind == "f")
        elif isinstance(values, tuple):
            same = values == (found.texts(name) or ("",) * len(found))
        else:
            same = True
            worst, summed, count = _difference(values, found.pictures(name))
            greatest, total, pixels = max(greatest, worst), total + summed, pixels + count
        if not same:
            raise DatasetError(
                f"{expected.where}: {name!r} was written as something else; the conversion is wrong"
            )
    return Comparison(1, len(found), (actions_sha256(found),), greatest, total, pixels)


def actions_sha256(trajectory: Trajectory) -> str:
    """Of the bytes of all features whose names begin with "action", by name."""
    digest = hashlib.sha256()
    for name in sorted(trajectory.steps):
        values = trajectory.steps[name]
        if name.startswith("action") and isinstance(values, np.ndarray):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _difference(expected: Pictures, found: Pictures) -> tuple[int, int, int]:
    """Greatest and total difference, and of how many values; equal files are not decoded and count for none."""
    if (
        isinstance(expected, EncodedPictures)
        and isinstance(found, EncodedPictures)
        and tuple(expected.encoded) == tuple(found.encoded)
    ):
        return 0, 0, 0
    greatest = total = pixels = 0
    for t in range(len(expected)):
        difference = np.abs(expected.decode(t).astype(np.int16) - found.decode(t))
        greatest = max(greatest, int(difference.max()))
        total += int(difference.sum())
        pixels += difference.size
    return greatest, total, pixels
