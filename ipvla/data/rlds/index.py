"""Where each episode lies and how long it is: made by reading a dataset once, stored in a file that is mapped."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ipvla.files import record_of, replacing, write_text

_ROW = np.dtype(
    [
        *(("shard", "<i4"), ("offset", "<i8"), ("size", "<i8")),
        *(("steps", "<i4"), ("task", "<i4"), ("family", "<i4")),
    ]
)


@dataclass(frozen=True)
class EpisodeEntry:
    """One readable episode.

    Attributes:
        shard: number of the shard.
        offset, size: of the record, as `ShardRecords.places` gives them.
        steps: control steps.
        task, family: labels, "" where the dataset has none.
    """

    shard: int
    offset: int
    size: int
    steps: int
    task: str
    family: str


class EpisodeIndex:
    """All readable episodes of a split, in the order of the shards, 32 bytes each.

    Args:
        rows: structured array [E], perhaps mapped from a file.
        labels: the texts that rows refer to by number.
        broken: what was wrong with the episodes that were left out, a message each.
    """

    def __init__(
        self, rows: npt.NDArray[Any], labels: tuple[str, ...] = ("",), broken: tuple[str, ...] = ()
    ) -> None:
        self._rows = rows
        self._labels = labels
        self.broken = broken

    @classmethod
    def of(cls, entries: Iterable[EpisodeEntry], broken: Iterable[str] = ()) -> Self:
        numbers: dict[str, int] = {}
        rows = [
            (
                *(entry.shard, entry.offset, entry.size, entry.steps),
                numbers.setdefault(entry.task, len(numbers)),
                numbers.setdefault(entry.family, len(numbers)),
            )
            for entry in entries
        ]
        return cls(np.array(rows, _ROW), tuple(numbers), tuple(broken))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [E], control steps."""
        return self._rows["steps"].astype(np.int64)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._labels[number] for number in self._rows["task"].tolist())

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self._labels[number] for number in self._rows["family"].tolist())

    def place(self, index: int) -> tuple[int, int, int]:
        """Shard, offset and size of an episode's record."""
        shard, offset, size, *_ = self._rows[index].item()
        return shard, offset, size

    def save(self, path: Path) -> None:
        """Writes `path` (.npy) and its labels beside it; each appears whole, the rows last."""
        rows = np.asarray(self._rows)
        texts = {"labels": self._labels, "broken": self.broken, "crc32": zlib.crc32(rows.tobytes())}
        write_text(path.with_suffix(".json"), json.dumps(texts))
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, rows)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The inverse of `save`; None if nothing whole is there."""
        try:
            texts = record_of(path.with_suffix(".json").read_bytes())
            rows = np.load(path, mmap_mode="r")
            if rows.dtype != _ROW or zlib.crc32(rows.tobytes()) != texts["crc32"]:
                return None
            labels, broken = tuple(map(str, texts["labels"])), tuple(map(str, texts["broken"]))
            numbers = rows[["task", "family"]].tolist()
            return cls(rows, labels, broken) if max(map(max, numbers), default=0) < len(labels) else None
        except Exception:  # NumPy's parser of a header raises what Python's does
            return None
