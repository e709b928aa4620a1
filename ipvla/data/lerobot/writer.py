"""A LeRobotDataset v3 in parts: each part is a dataset of its own, of consecutive episodes, in one file per kind.

Parts are numbered, and know which episode and row of the whole they begin with, so that they can be written at the
same time on different machines and put together by giving their files second names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ipvla.data.lerobot.encoder import VideoEncoder
from ipvla.data.lerobot.format import (
    CODEBASE_VERSION,
    DATA_PATH,
    EPISODES_PATH,
    FILES_PER_CHUNK,
    INDEX_FEATURES,
    INFO,
    METADATA,
    STATISTICS,
    TASK,
    TASKS,
    VIDEO_PATH,
    Layout,
    numbered,
)
from ipvla.data.lerobot.statistics import Moments, aggregate, episode_statistics, json_values
from ipvla.data.pictures import encoded
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory, picture_shape
from ipvla.files import link

#: How Hugging Face's datasets keeps pictures in parquet.
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class PartWriter:
    """Writes one part, episode by episode; whole only after `close`.

    Args:
        directory: of the part, new or empty.
        layout: of the whole dataset.
        part: its number.
        first_episode, first_row: where in the whole it begins.
        tasks: the task in words -> task_index; tasks that are not in it yet are added, in their order.
    """

    def __init__(
        self, directory: Path, layout: Layout, part: int, first_episode: int, first_row: int, tasks: dict[str, int]
    ) -> None:
        self._directory, self._layout, self._part, self._tasks = directory, layout, part, tasks
        self._first_episode, self._first_row = first_episode, first_row
        self.rows = 0
        self._episodes: list[dict[str, Any]] = []
        self._statistics: list[dict[str, Moments]] = []
        self._data: Any = None
        self._videos: dict[str, VideoEncoder] = {}

    @property
    def episodes(self) -> int:
        """How many were written."""
        return len(self._episodes)

    def add(self, trajectory: Trajectory) -> None:
        """The next episode.

        Raises:
            DatasetError: it lacks a feature, has other shapes than the layout, or a picture cannot be decoded.
        """
        number, length = self._first_episode + self.episodes, len(trajectory)
        spoken = trajectory.texts(TASK) or ("",) * length
        steps: dict[str, Steps] = {
            "timestamp": (np.arange(length) / self._layout.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(length) + self._first_row + self.rows,
            "task_index": np.array([self._tasks.setdefault(text, len(self._tasks)) for text in spoken]),
        }
        try:
            steps |= {name: _checked(trajectory, name, of) for name, of in self._layout.features.items()}
            depths = {name for name, of in self._layout.features.items() if of.is_depth and of.shape[2] == 1}
            statistics = episode_statistics(steps, depths)
            videos = self._add_videos(steps) if self._layout.video else {}
        except DatasetError:
            raise
        except ValueError as error:
            raise DatasetError(f"{trajectory.where} has a picture that cannot be used: {error}") from error
        self._add_rows(steps)
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(spoken)),
            "length": length,
            **_file("data", self._part),
            "dataset_from_index": self._first_row + self.rows,
            "dataset_to_index": self._first_row + self.rows + length,
            **videos,
            **_told_statistics(statistics),
            **_file("meta/episodes", self._part),
            **{f"{METADATA}{name}": _plain(value) for name, value in trajectory.metadata.items()},
        }
        self._statistics.append(statistics)
        self._episodes.append(row)
        self.rows += length

    def close(self) -> None:
        """Writes what is left and the metadata. DatasetError if there were no episodes."""
        if not self._episodes:
            raise DatasetError(f"{self._directory} would have no episodes; give at least one")
        self._data.close()
        for video in self._videos.values():
            video.close()
        pq.write_table(pa.Table.from_pylist(self._episodes), self._path(EPISODES_PATH), compression="snappy")
        write_metadata(
            self._directory, self._layout, self._tasks, aggregate(self._statistics), self.episodes, self.rows
        )

    def _add_rows(self, steps: Mapping[str, Steps]) -> None:
        columns = {
            name: _array(values, self._feature(name))
            for name, values in steps.items()
            if name not in self._layout.videos
        }
        table = pa.table(columns)
        if self._data is None:
            small = [name for name in columns if self._feature(name).kind != "image"]
            self._data = pq.ParquetWriter(
                self._path(DATA_PATH), table.schema, compression="snappy", use_dictionary=small
            )
        self._data.write_table(table, row_group_size=table.num_rows)

    def _add_videos(self, steps: Mapping[str, Steps]) -> dict[str, Any]:
        assert self._layout.video is not None
        places: dict[str, Any] = {}
        for name in self._layout.videos:
            if name not in self._videos:
                path, shape = self._path(VIDEO_PATH, name), self._layout.features[name].shape
                self._videos[name] = VideoEncoder(path, self._layout.fps, shape, self._layout.video)
            video, pictures = self._videos[name], steps[name]
            assert not isinstance(pictures, np.ndarray | tuple)
            start = video.frames
            for t in range(len(pictures)):
                video.add(pictures.decode(t))
            places |= _file(f"videos/{name}", self._part)
            places[f"videos/{name}/from_timestamp"] = start / self._layout.fps
            places[f"videos/{name}/to_timestamp"] = video.frames / self._layout.fps
        return places

    def _path(self, pattern: str, video_key: str = "") -> Path:
        path = self._directory / pattern.format(video_key=video_key, **numbered(self._part))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _feature(self, name: str) -> Feature:
        return self._layout.features.get(name) or INDEX_FEATURES[name]


def _checked(trajectory: Trajectory, name: str, feature: Feature) -> Steps:
    if feature.kind == "image":
        pictures = trajectory.pictures(name)
        recorded = picture_shape(pictures, feature)
        if recorded != feature.shape:
            raise DatasetError(
                f"{trajectory.where}, {name!r}: pictures of {recorded}, and the dataset has {feature.shape}; "
                "leave it out"
            )
        return pictures
    if feature.kind == "text":
        return trajectory.texts(name) or ("",) * len(trajectory)
    values = trajectory.numbers(name).astype(feature.dtype, copy=False)
    shape = (len(trajectory), *feature.shape)
    if values.size != np.prod(shape):
        raise DatasetError(
            f"{trajectory.where}, {name!r}: {values.shape}, and the dataset has {shape}; leave it out"
        )
    return values.reshape(shape)


def _array(values: Steps, feature: Feature) -> Any:
    """As lerobot stores it: numbers of shapes () and [1] as scalars, vectors as lists of fixed size."""
    if isinstance(values, tuple):
        return pa.array(values, pa.string())
    if not isinstance(values, np.ndarray):
        return pa.array([{"bytes": each, "path": None} for each in encoded(values)], _PICTURE)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if feature.shape not in ((), (1,)):
        for size in reversed(feature.shape):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat


def _file(prefix: str, part: int) -> dict[str, int]:
    return {f"{prefix}/{name}": number for name, number in numbered(part).items()}


def _told_statistics(statistics: Mapping[str, Moments]) -> dict[str, Any]:
    return {
        f"stats/{name}/{key}": value
        for name, moments in statistics.items()
        for key, value in json_values(moments).items()
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def assemble(parts: Sequence[Path], directory: Path, layout: Layout, tasks: Mapping[str, int]) -> None:
    """Makes one dataset of all parts, which stay as they are.

    Args:
        parts: their directories, all of them, in order.
        directory: new or empty, in the same file system if the files are not to be copied.
        layout, tasks: of the whole.
    """
    infos = [json.loads((part / INFO).read_text()) for part in parts]
    for part in parts:
        for path in sorted(part.rglob("chunk-*/file-*")):
            link(path, directory / path.relative_to(part))
    statistics = aggregate([json.loads((part / STATISTICS).read_text()) for part in parts])
    episodes, rows = (sum(each[key] for each in infos) for key in ("total_episodes", "total_frames"))
    write_metadata(directory, layout, tasks, statistics, episodes, rows)


def write_metadata(
    directory: Path,
    layout: Layout,
    tasks: Mapping[str, int],
    statistics: Mapping[str, Moments],
    episodes: int,
    rows: int,
) -> None:
    """Writes `meta/info.json`, `meta/stats.json` and `meta/tasks.parquet`; `rows` and `episodes` are how many."""
    import pandas as pd

    index = {name: {"dtype": of.dtype, "shape": [1], "names": None} for name, of in INDEX_FEATURES.items()}
    info = {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": layout.robot_type,
        "total_episodes": episodes,
        "total_frames": rows,
        "total_tasks": len(tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": layout.fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if layout.video is not None else None,
        "features": {**layout.info_features(), **index},
    }
    (directory / INFO).write_text(json.dumps(info, indent=4, ensure_ascii=False))
    values = {name: json_values(moments) for name, moments in statistics.items()}
    (directory / STATISTICS).write_text(json.dumps(values, indent=4))
    # lerobot looks tasks up by pandas' index, in which the texts are.
    index = pd.Index(list(tasks), dtype=object, name=TASK)
    pd.DataFrame({"task_index": np.array(list(tasks.values()), np.int64)}, index=index).to_parquet(
        directory / TASKS
    )
