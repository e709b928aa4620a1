"""`meta/episodes`: where each episode of a LeRobotDataset v3 lies, how long it is, and what it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ipvla.data.lerobot.format import METADATA, Info, Tree
from ipvla.data.source import DatasetError, refuse_foreign
from ipvla.files import one_line

_COPY_AGAIN = "copy or convert the dataset again"


class Episodes:
    """The rows of `meta/episodes/*/*.parquet`, without their statistics, by position.

    Attributes:
        lengths: int64 [E].
        tasks, families: one text per episode; a dataset that came from another format may have that one's
            labels, else it is the first of the episode's tasks in words, and "".
    """

    def __init__(self, table: Any) -> None:
        self._table = table
        self._numbers: npt.NDArray[np.int64] = _integers(table["episode_index"])
        self.lengths: npt.NDArray[np.int64] = _integers(table["length"])
        self._first: npt.NDArray[np.int64] = _integers(table["dataset_from_index"])
        self._file = {
            prefix: (_integers(table[f"{prefix}/chunk_index"]), _integers(table[f"{prefix}/file_index"]))
            for prefix in (
                name.removesuffix("/file_index") for name in table.column_names if "/file_index" in name
            )
        }
        self._file_first: dict[tuple[int, int], int] = {}
        for chunk, file, first in zip(*self._file["data"], self._first, strict=True):
            key = int(chunk), int(file)
            self._file_first[key] = min(self._file_first.get(key, int(first)), int(first))
        spoken = [texts[0] if texts else "" for texts in table["tasks"].to_pylist()]
        self.tasks = self._labels("task", spoken)
        self.families = self._labels("family", [""] * len(spoken))

    @classmethod
    def read(cls, tree: Tree, info: Info) -> Episodes:
        """DatasetError if rows are missing, double, or not as many as `meta/info.json` says."""
        names = tree.glob("meta/episodes/*/*.parquet")
        if not names:
            raise DatasetError(f"{tree.location} has no meta/episodes/*/*.parquet; {_COPY_AGAIN}")
        try:
            table = pa.concat_tables([_read(tree, name) for name in names], promote_options="permissive")
            episodes = cls(table.sort_by("episode_index").combine_chunks())
            missing = [key for key in sorted(info.videos) if f"videos/{key}" not in episodes._file]
        except DatasetError:
            raise
        except (AttributeError, LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
            raise DatasetError(
                f"{tree.location}/meta/episodes is damaged ({one_line(error)}); {_COPY_AGAIN}"
            ) from None
        if missing:
            raise DatasetError(f"{tree.location}/meta/episodes lists no videos of {missing}; {_COPY_AGAIN}")
        listed = len(episodes.lengths), int(episodes.lengths.sum())
        if listed != (info.episodes, info.frames) or (np.diff(episodes._numbers) < 1).any():
            raise DatasetError(
                f"{tree.location}/meta/episodes lists {listed[0]} episodes of {listed[1]} frames, and "
                f"meta/info.json says {info.episodes} of {info.frames}; {_COPY_AGAIN}"
            )
        gaps = np.flatnonzero(np.diff(episodes._numbers) > 1)
        if len(gaps):
            last, following = episodes._numbers[gaps[0] : gaps[0] + 2].tolist()
            raise DatasetError(
                f"{tree.location}/meta/episodes goes from episode {last} to {following}: what was between was "
                "taken out; take episodes out with `lerobot-edit-dataset`, which numbers the others anew"
            )
        if not len(episodes.lengths) or episodes.lengths.min() < 1:
            raise DatasetError(f"{tree.location} has no episodes, or empty ones; {_COPY_AGAIN}")
        return episodes

    def number(self, index: int) -> int:
        """The dataset's own `episode_index` of an episode."""
        return int(self._numbers[index])

    def data_file(self, index: int, pattern: str) -> tuple[str, int]:
        """The file that holds an episode's rows, and the first of them within it."""
        chunk, file = (int(values[index]) for values in self._file["data"])
        name = pattern.format(chunk_index=chunk, file_index=file)
        return name, int(self._first[index]) - self._file_first[chunk, file]

    def video_file(self, index: int, key: str, pattern: str) -> tuple[str, float]:
        """The video that holds an episode's frames, and when it begins in it, in seconds."""
        chunk, file = (int(values[index]) for values in self._file[f"videos/{key}"])
        name = pattern.format(video_key=key, chunk_index=chunk, file_index=file)
        return name, float(self._table[f"videos/{key}/from_timestamp"][index].as_py())

    def metadata(self, index: int) -> Mapping[str, Any]:
        """What another format knew of an episode."""
        return {
            name.removeprefix(METADATA): self._table[name][index].as_py()
            for name in self._table.column_names
            if name.startswith(METADATA)
        }

    def _labels(self, name: str, otherwise: list[str]) -> tuple[str, ...]:
        column = f"{METADATA}{name}"
        return tuple(self._table[column].to_pylist() if column in self._table.column_names else otherwise)


def _read(tree: Tree, name: str) -> Any:
    try:
        with tree.files.open(tree.path(name), "rb") as handle:
            file = pq.ParquetFile(handle)
            columns = [column for column in file.schema_arrow.names if not column.startswith("stats/")]
            return file.read(columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        refuse_foreign(f"{tree.location}/{name}")
        raise DatasetError(f"{tree.location}/{name} is damaged ({one_line(error)}); {_COPY_AGAIN}") from None


def _integers(column: Any) -> npt.NDArray[np.int64]:
    return np.asarray(column.to_numpy(), np.int64)
