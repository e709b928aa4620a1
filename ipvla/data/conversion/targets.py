"""What datasets are converted to: each can write a part, and put parts together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ipvla.data import lerobot, rlds
from ipvla.data.lerobot.metadata import assemble as assemble_lerobot
from ipvla.data.lerobot.parts import PartWriter
from ipvla.data.rlds.layout import RldsLayout
from ipvla.data.rlds.parts import assemble as assemble_rlds
from ipvla.data.rlds.parts import write_part as write_rlds_part
from ipvla.data.source import DatasetError, EpisodeSource, Feature, Trajectory


@dataclass(frozen=True)
class Part:
    """Consecutive episodes that are converted together.

    Attributes:
        number: of the part, from 0.
        first, last: of the source's episodes, `last` not included.
        first_row: control steps of all episodes before.
    """

    number: int
    first: int
    last: int
    first_row: int


class Target(Protocol):
    """One dataset that is to be; picklable."""

    def write(self, directory: Path, part: Part, trajectories: Iterable[Trajectory]) -> None:
        """Writes a part, as a dataset of its own."""
        ...

    def open(self, directory: Path) -> EpisodeSource:
        """A part, or the whole."""
        ...

    def assemble(self, parts: Sequence[Path], directory: Path) -> None:
        """Makes the whole of all parts, in their order."""
        ...


@dataclass(frozen=True)
class LeRobotTarget:
    """A LeRobotDataset v3.

    Attributes:
        layout: of the whole.
        tasks: all tasks in words -> task_index.
    """

    layout: lerobot.Layout
    tasks: Mapping[str, int] = field(default_factory=dict)

    def write(self, directory: Path, part: Part, trajectories: Iterable[Trajectory]) -> None:
        tasks = dict(self.tasks)
        writer = PartWriter(directory, self.layout, part.number, part.first, part.first_row, tasks)
        for trajectory in trajectories:
            writer.add(trajectory)
        writer.close()

    def open(self, directory: Path) -> EpisodeSource:
        return lerobot.LeRobotSource(directory)

    def assemble(self, parts: Sequence[Path], directory: Path) -> None:
        assemble_lerobot(parts, directory, self.layout, self.tasks)


@dataclass(frozen=True)
class RldsTarget:
    """An RLDS dataset; `layout` is of the whole."""

    layout: RldsLayout

    def write(self, directory: Path, part: Part, trajectories: Iterable[Trajectory]) -> None:
        write_rlds_part(directory, self.layout, trajectories)

    def open(self, directory: Path) -> EpisodeSource:
        return rlds.RldsSource(directory)

    def assemble(self, parts: Sequence[Path], directory: Path) -> None:
        assemble_rlds(parts, directory, self.layout)


def metadata_features(metadata: Mapping[str, Any]) -> dict[str, Feature]:
    """What the metadata of an episode holds. DatasetError if a value is neither text nor number."""
    features = {}
    for name, value in metadata.items():
        if isinstance(value, str):
            features[name] = Feature("text", (), "str")
            continue
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise DatasetError(f"metadata {name!r} is {value!r}, neither text nor number")
        features[name] = Feature("number", array.shape, array.dtype.name)
    return features
