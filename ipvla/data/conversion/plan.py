"""What is converted, from which format and to which, and in which parts: all that a worker needs to know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ipvla.data import lerobot, rlds, sources
from ipvla.data.conversion.columns import Columns, columns
from ipvla.data.lerobot.format import INFO, Tree
from ipvla.data.lerobot.writer import PartWriter
from ipvla.data.lerobot.writer import assemble as assemble_lerobot
from ipvla.data.libero_hdf5 import LiberoHdf5Source
from ipvla.data.pictures import EncodedPictures
from ipvla.data.rlds.format import RldsLayout
from ipvla.data.rlds.writer import assemble as assemble_rlds
from ipvla.data.rlds.writer import write_part as write_rlds_part
from ipvla.data.source import DatasetError, EpisodeSource, Feature, Trajectory, picture_shape

RLDS, LEROBOT, HDF5 = "rlds", "lerobot", "libero_hdf5"


def format_of(location: str) -> str:
    """ "rlds", "lerobot" or "libero_hdf5". DatasetError if nothing is there, or nothing that is known."""
    tree = Tree(location)
    if not tree.files.exists(tree.path("")) and not location.endswith(".hdf5"):
        raise DatasetError(f"source {location} does not exist; give the directory or address of a dataset")
    if tree.exists(INFO):
        return LEROBOT
    if tree.exists("dataset_info.json") or tree.glob("*/dataset_info.json"):
        return RLDS
    if tree.local and (location.endswith(".hdf5") or tree.glob("*.hdf5")):
        return HDF5
    raise DatasetError(
        f"{location} is neither an RLDS version directory (dataset_info.json), nor a LeRobotDataset ({INFO}), nor "
        "a local directory of LIBERO's *.hdf5 files"
    )


def open_source(location: str, cache_directory: Path, skip_bad_episodes: bool = False) -> EpisodeSource:
    """The episodes of a dataset in any format; lists of episodes and remote videos are stored in a directory.

    Raises:
        DatasetError: it is none, or damaged.
    """
    if format_of(location) == HDF5:
        return LiberoHdf5Source(location)
    return sources.open_source(location, read_root=cache_directory, skip_bad_episodes=skip_bad_episodes)


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


#: A dataset that is to be: each can write a part, open a part or the whole, and put parts together.
Target: TypeAlias = LeRobotTarget | RldsTarget


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


_JPEG = b"\xff\xd8"


@dataclass(frozen=True)
class ConversionConfig:
    """One conversion.

    Attributes:
        source: directory or address of an RLDS dataset, a LeRobotDataset v3 or LIBERO's HDF5 files.
        target: the directory that the dataset is to be; local, and seen by all workers.
        to: "lerobot" or "rlds".
        name: of an RLDS dataset.
        fps: control steps per second, which a LeRobotDataset must state; None for the source's, if it states them.
        video: how pictures are encoded for LeRobot; None keeps them as they are.
        robot_type: what a LeRobotDataset says of it; "" for nothing.
        file_format: of RLDS's shards, "tfrecord" or "array_record".
        leave_out: features of the source that the target lacks.
        episodes_per_part: of one file, and of one piece of work.
        max_mean_difference: the most that pictures of a video may differ on average, in levels of 255.
        skip_bad_episodes: leave out RLDS episodes that cannot be read.
    """

    source: str
    target: Path
    to: str
    name: str = "dataset"
    fps: int | None = None
    video: lerobot.VideoSettings | None = None
    robot_type: str = ""
    file_format: str = "tfrecord"
    leave_out: tuple[str, ...] = ()
    episodes_per_part: int = 50
    max_mean_difference: float = 6.0
    skip_bad_episodes: bool = False

    def __post_init__(self) -> None:
        if self.to not in (LEROBOT, RLDS):
            raise ValueError(f"to is {self.to!r}; choose 'lerobot' or 'rlds'")
        if self.episodes_per_part < 1:
            raise ValueError(f"episodes_per_part is {self.episodes_per_part}; set it to at least 1")

    def build(self) -> Plan:
        """Opens the source and lays the target out. DatasetError if the one cannot become the other."""
        source = open_source(self.source, self.work, self.skip_bad_episodes)
        naming = LEROBOT if format_of(self.source) == LEROBOT else RLDS
        mapped = columns(source.features, naming, self.to, self.leave_out)
        first = mapped.apply(source.trajectory(0))
        starts = range(0, len(source.lengths), self.episodes_per_part)
        rows = np.concatenate([[0], np.cumsum(source.lengths)])
        parts = tuple(
            Part(number, start, min(start + self.episodes_per_part, len(source.lengths)), int(rows[start]))
            for number, start in enumerate(starts)
        )
        lengths = hashlib.sha256(np.asarray(source.lengths, "<i8").tobytes()).hexdigest()
        return Plan(self, mapped, self._target(source, mapped.features, first), parts, lengths)

    @property
    def work(self) -> Path:
        """Where parts lie until all are there, beside the target."""
        return self.target.with_name(f".{self.target.name}.converting")

    def _target(self, source: EpisodeSource, features: Mapping[str, Feature], first: Trajectory) -> Target:
        if self.to == RLDS:
            encodings = {name: _encoding(first, name) for name, f in features.items() if f.kind == "image"}
            rate = f", {source.fps:g} control steps per second." if source.fps else "."
            described = f"Converted from {source.name}{rate}"
            metadata = metadata_features(first.metadata)
            return RldsTarget(RldsLayout(self.name, features, encodings, metadata, self.file_format, described))
        fps = self.fps if self.fps is not None else source.fps
        if fps is None or fps != int(fps):
            raise DatasetError(
                f"fps is {fps}: {source.location} does not state it; give --fps, for example --fps 10"
            )
        written = {
            name: replace(feature, shape=picture_shape(first.pictures(name), feature))
            if feature.kind == "image"
            else feature
            for name, feature in features.items()
            if name != lerobot.TASK
        }
        return LeRobotTarget(lerobot.Layout(int(fps), written, self.video, self.robot_type or None))


@dataclass(frozen=True)
class Plan:
    """A conversion in parts; picklable, and the same whenever it is made anew.

    Attributes:
        config: what was asked for.
        columns: how the source's features become the target's.
        target: what is written.
        parts: all of them.
        lengths_sha256: of the source's episode lengths.
    """

    config: ConversionConfig
    columns: Columns
    target: Target
    parts: tuple[Part, ...]
    lengths_sha256: str = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Text that is equal where parts may be used together."""
        return json.dumps([repr(self.config), repr(self.columns), repr(self.target), self.lengths_sha256])


def _encoding(first: Trajectory, name: str) -> str:
    pictures = first.pictures(name)
    return "jpeg" if isinstance(pictures, EncodedPictures) and pictures.encoded[0][:2] == _JPEG else "png"
