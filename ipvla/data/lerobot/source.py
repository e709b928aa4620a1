"""The episodes of a LeRobotDataset v3, from local disks and object storage."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ipvla.data.lerobot.episodes import Episodes
from ipvla.data.lerobot.format import INDEX_FEATURES, TASK, TASKS, Info, Tree
from ipvla.data.lerobot.video import Downloads, VideoFile, VideoPictures
from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.data.source import BrokenEpisodeError, DatasetError, EpisodeSource, Steps, Trajectory, refuse_foreign
from ipvla.files import one_line

_COPY_AGAIN = "copy or convert the dataset again"
#: The most recently used videos stay open.
_OPEN_VIDEOS = 8
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class LeRobotSource(EpisodeSource):
    """The episodes of one dataset, in its own order; safe to use from several threads.

    Opening reads the metadata only. An episode reads the row groups that hold it: lerobot writes one group per
    episode, and so do conversions; of files with larger groups, the whole group is read.

    Features are named as the dataset names them ("observation.state", "observation.images.front", "action"), and
    `task` gives the task in words at each step. Numbers have the shape that `meta/info.json` gives, so [T, 1] for
    a shape of [1]; but the index columns, such as `timestamp`, are [T].

    Args:
        location: the directory with `meta`, `data` and `videos`, or its address in object storage.
        cache_directory: of remote videos; needed for those alone.

    Raises:
        DatasetError: it is no LeRobotDataset v3, or its metadata is incomplete or contradicts itself.
    """

    format = "LeRobotDataset v3"

    def __init__(self, location: str | Path, cache_directory: Path | None = None) -> None:
        self._tree = Tree(str(location))
        self.location = self._tree.location
        self.name = self.inner_name = self.location.rpartition("/")[2]
        self._info = Info.read(self._tree)
        self.fps = self._info.fps
        self.features = dict(self._info.features)
        self._episodes = Episodes.read(self._tree, self._info)
        self._texts = _task_texts(self._tree)
        self.lengths = self._episodes.lengths
        self.tasks = self._episodes.tasks
        self.families = self._episodes.families
        self._open_video = lru_cache(_OPEN_VIDEOS)(VideoFile)
        self._local_copy = Downloads(self._tree, cache_directory)
        self._footers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _trajectory(self, index: int) -> Trajectory:
        name, first_row = self._episodes.data_file(index, self._info.data_path)
        where = f"{self.name}: {self.location}/{name}, episode {self._episodes.number(index)}"
        try:
            table = self._rows(name, first_row, int(self.lengths[index]))
            owners = set(table["episode_index"].to_pylist())
            if owners != {self._episodes.number(index)}:
                raise ValueError(f"its rows are of episodes {sorted(owners)}")
            steps = {key: self._steps(key, table, index) for key in self.features}
        except (AttributeError, LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
            refuse_foreign(f"{self._tree.location}/{name}")
            raise BrokenEpisodeError(
                f"{where} cannot be read ({type(error).__name__}: {one_line(error)}); {_COPY_AGAIN}"
            ) from error
        return Trajectory(steps, where, self._episodes.metadata(index))

    def _rows(self, name: str, first: int, count: int) -> Any:
        """Rows `first` to `first + count` of a parquet file."""
        with self._tree.files.open(self._tree.path(name), "rb") as handle:
            with self._lock:
                footer = self._footers.get(name)
            file = pq.ParquetFile(handle, metadata=footer)
            with self._lock:
                self._footers[name] = file.metadata
            starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
            if first + count > starts[-1]:
                raise ValueError(f"the file has {starts[-1]} rows, the episode ends at row {first + count}")
            groups = np.flatnonzero((starts[:-1] < first + count) & (starts[1:] > first))
            table = file.read_row_groups(groups.tolist(), use_threads=False)
            return table.slice(first - int(starts[groups[0]]), count).combine_chunks()

    def _steps(self, key: str, table: Any, index: int) -> Steps:
        feature = self.features[key]
        if key == TASK:
            return tuple(self._texts[number] for number in table["task_index"].to_pylist())
        if key in self._info.videos:
            return self._video(key, table, index)
        column = table[key]
        if feature.kind == "image":
            return self._pictures(column)
        if feature.kind == "text":
            return _column_texts(column)
        return _numbers(column, () if key in INDEX_FEATURES else feature.shape, feature.dtype)

    def _pictures(self, column: Any) -> Pictures:
        """Each is encoded in its row, or else in a file whose path is there."""
        values = column.combine_chunks()
        rows = zip(values.field("bytes").to_pylist(), values.field("path").to_pylist(), strict=True)
        return EncodedPictures(tuple(encoded or self._tree.read(path or "") for encoded, path in rows))

    def _video(self, key: str, table: Any, index: int) -> Pictures:
        name, start_s = self._episodes.video_file(index, key, self._info.video_path)
        times = _numbers(table["timestamp"], (), "float64")
        return VideoPictures(self._open_video, self._local_copy, name, start_s + times, 0.25 / self._info.fps)


def _task_texts(tree: Tree) -> Mapping[int, str]:
    """task_index -> the task in words; pandas keeps the texts in a column of its index, whatever its name."""
    try:
        with tree.files.open(tree.path(TASKS), "rb") as handle:
            table = pq.read_table(handle)
        (column,) = [name for name in table.column_names if name != "task_index"]
        texts: Sequence[str] = table[column].to_pylist()
        return dict(zip(table["task_index"].to_pylist(), texts, strict=True))
    except (LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
        refuse_foreign(f"{tree.location}/{TASKS}")
        raise DatasetError(
            f"{tree.location}/{TASKS} is missing or damaged ({one_line(error)}); {_COPY_AGAIN}"
        ) from None


def _numbers(column: Any, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """A column of T scalars or (nested) lists, as [T, *shape]. ValueError if that is not what it holds."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    rows = len(values)
    while any(is_kind(values.type) for is_kind in _LISTS):
        values = values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(dtype).reshape(rows, *shape)


def _column_texts(column: Any) -> tuple[str, ...]:
    """A column of T texts; equal ones share their memory, and nulls are ""."""
    encoded = column.combine_chunks().dictionary_encode()
    known = [text or "" for text in encoded.dictionary.to_pylist()]
    return tuple("" if i is None else known[i] for i in encoded.indices.to_pylist())
