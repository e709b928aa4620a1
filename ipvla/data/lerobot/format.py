"""The files of a LeRobotDataset v3 and what `meta/info.json` says (lerobot 0.4, `datasets/utils.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ipvla.data.lerobot.encoder import VideoSettings, video_info
from ipvla.data.source import DatasetError, Feature, file_system
from ipvla.files import one_line, record_of

CODEBASE_VERSION = "v3.0"
INFO = "meta/info.json"
STATISTICS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PATH = f"meta/episodes/{_FILE}.parquet"
DATA_PATH = f"data/{_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{_FILE}.mp4"
FILES_PER_CHUNK = 1000

#: The columns of every row, all scalars: seconds and steps since the episode began, the episode, the row in the
#: whole dataset, the task.
INDEX_FEATURES: Final[Mapping[str, Feature]] = {
    "timestamp": Feature("number", (), "float32"),
    "frame_index": Feature("number", (), "int64"),
    "episode_index": Feature("number", (), "int64"),
    "index": Feature("number", (), "int64"),
    "task_index": Feature("number", (), "int64"),
}
#: What a reader makes of `task_index`: the task in words.
TASK = "task"
#: Columns of an episode that hold what another format knew of it.
METADATA = "episode_metadata/"

_PICTURES = ("image", "video")
_CONVERT = (
    "`python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=NAME --root={} --push-to-hub=false` (before "
    "lerobot 0.5.1 it was lerobot.datasets.v30.convert_dataset_v21_to_v30)"
)


class Tree:
    """The files under one directory, on a local disk or in object storage.

    Attributes:
        location: as it was given, for messages.
        local: True if the files have paths here.

    Raises:
        DatasetError: nothing that is installed knows such addresses.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self.files, self._root = file_system(self.location)
        protocol = self.files.protocol
        self.local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def path(self, name: str) -> str:
        """The file system's path of a file."""
        return f"{self._root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.files.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        return bytes(self.files.cat_file(self.path(name)))

    def glob(self, pattern: str) -> list[str]:
        """Names of files, sorted."""
        return sorted(str(path)[len(self._root) + 1 :] for path in self.files.glob(self.path(pattern)))


@dataclass(frozen=True)
class Info:
    """What a reader needs of `meta/info.json`.

    Attributes:
        fps: control steps per second.
        features: by name, as `Trajectory.steps` gives them; image features are [H, W, 3].
        videos: those image features that are stored as video.
        episodes, frames: how many there are.
        data_path, video_path: patterns of the files' names, with chunk_index, file_index and video_key.
    """

    fps: float
    features: Mapping[str, Feature]
    videos: frozenset[str]
    episodes: int
    frames: int
    data_path: str
    video_path: str

    @classmethod
    def read(cls, tree: Tree) -> Info:
        """DatasetError if the file is missing, damaged, or of another version of the format."""
        if not tree.exists(INFO):
            raise DatasetError(f"{tree.location} holds no {INFO}; give the directory of a LeRobotDataset v3")
        try:
            values = record_of(tree.read(INFO))
            _require_version(tree.location, str(values["codebase_version"]))
            return cls(
                fps=float(values["fps"]),
                features=_features(values["features"]),
                videos=frozenset(key for key, f in values["features"].items() if f["dtype"] == "video"),
                episodes=int(values["total_episodes"]),
                frames=int(values["total_frames"]),
                data_path=_pattern(values["data_path"]),
                video_path=_pattern(values.get("video_path") or VIDEO_PATH),
            )
        except DatasetError:
            raise
        except (AttributeError, ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{tree.location}/{INFO} is damaged ({one_line(error)}); copy the dataset again"
            ) from None


def numbered(part: int) -> dict[str, int]:
    """The file of a part: its chunk_index and file_index."""
    return {"chunk_index": part // FILES_PER_CHUNK, "file_index": part % FILES_PER_CHUNK}


def _pattern(pattern: str) -> str:
    """A pattern of file names. ValueError or others if it is none, or leads out of the dataset."""
    name = pattern.format(chunk_index=0, file_index=0, video_key="x")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{pattern:.100} leads out of the dataset")
    return pattern


def _require_version(location: str, version: str) -> None:
    major = version.lstrip("v").partition(".")[0]
    if major == "3":
        return
    if major == "2":
        first = "" if version.startswith("v2.1") else "to v2.1 with an older lerobot first, and then "
        remedy = f"convert it {first}with {_CONVERT.format(location)}"
    else:
        remedy = "convert it with the lerobot package of that version"
    raise DatasetError(f"{location} is a LeRobotDataset {version}, and v3 is read here; {remedy}")


def _is_depth(value: Mapping[str, Any]) -> bool:
    """Whether a picture is marked as depth, as lerobot marks it; `video.` was there before 0.4."""
    info = value.get("info") or value.get("video_info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _is_number(dtype: Any) -> bool:
    """Annotations of lerobot 0.6 (dtype "language") are neither number nor text, and are left out."""
    try:
        return np.dtype(dtype).kind in "biuf"
    except TypeError:
        return False


def _features(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Feature]:
    features = {}
    for name, value in values.items():
        shape = tuple(int(size) for size in value["shape"])
        if name in INDEX_FEATURES:
            features[name] = INDEX_FEATURES[name]
        elif value["dtype"] in _PICTURES:
            dtype = "uint16" if _is_depth(value) else "uint8"
            features[name] = Feature("image", _channels_last(shape, value.get("names")), dtype)
        elif value["dtype"] == "string":
            features[name] = Feature("text", (), "str")
        elif _is_number(value["dtype"]):
            features[name] = Feature("number", shape, value["dtype"])
    return {**features, TASK: Feature("text", (), "str")}


def _channels_last(shape: tuple[int, ...], names: Any) -> tuple[int, ...]:
    # Some recorders wrote [3, H, W]; the pictures themselves know no such order.
    if isinstance(names, list) and str(names[0]).startswith("channel"):
        return (*shape[1:], shape[0])
    return shape


@dataclass(frozen=True)
class Layout:
    """The features of every step, and how they are stored.

    Attributes:
        fps: control steps per second.
        features: by LeRobot's names, with dots; images are [H, W, 3], and no size varies. The index columns and
            `task` come by themselves.
        video: how pictures are encoded as video; None keeps each as it is, a PNG or JPEG in its row, and so does
            depth always.
        robot_type: a name, or None.

    Raises:
        DatasetError: the format cannot hold a feature.
    """

    fps: int
    features: Mapping[str, Feature]
    video: VideoSettings | None = None
    robot_type: str | None = None

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise DatasetError(f"fps is {self.fps}; give the control steps per second, for example 10")
        for name, feature in self.features.items():
            if "/" in name or name in INDEX_FEATURES or name == TASK:
                raise DatasetError(f"feature {name!r} cannot have this name in a LeRobotDataset; rename it")
            channels = (1, 3) if feature.is_depth else (3,)  # other programs write depth in three, too
            if feature.kind == "image" and (len(feature.shape) != 3 or feature.shape[2] not in channels):
                raise DatasetError(
                    f"feature {name!r} is {list(feature.shape)}, no [H, W, {channels[0]}] picture; leave it out"
                )
            if 0 in feature.shape:
                raise DatasetError(f"feature {name!r} is {list(feature.shape)}: its size varies; leave it out")

    @property
    def videos(self) -> tuple[str, ...]:
        """The features that are stored as video: not depth, which a video would cut to 8 bits."""
        cameras = tuple(name for name, feature in self.features.items() if feature.is_camera)
        return cameras if self.video is not None else ()

    def info_features(self) -> dict[str, dict[str, Any]]:
        """As in `meta/info.json`."""
        return {name: self._entry(feature) for name, feature in self.features.items()}

    def _entry(self, feature: Feature) -> dict[str, Any]:
        if feature.kind == "text":
            return {"dtype": "string", "shape": [1], "names": None}
        if feature.kind == "number":
            return {"dtype": feature.dtype, "shape": list(feature.shape) or [1], "names": None}
        entry: dict[str, Any] = {
            "dtype": "image",
            "shape": list(feature.shape),
            "names": ["height", "width", "channels"],
        }
        if feature.is_depth:
            return entry | {"info": {"is_depth_map": True}}
        if self.video is None:
            return entry
        return entry | {"dtype": "video", "info": video_info(feature.shape, self.fps, self.video)}
