"""Writes the records of a shard, as `records` reads them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
from array_record.python.array_record_module import ArrayRecordWriter


class RecordWriter(Protocol):
    """A shard that is being written; whole only after `close`."""

    def write(self, record: bytes) -> None: ...
    def close(self) -> None: ...


class TFRecordWriter:
    """An uncompressed TFRecord file: each record behind its length, both with CRC-32C (tensorflow/core/lib/io)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, record: bytes) -> None:
        length = struct.pack("<Q", len(record))
        for part in (length, record):
            self._file.write(part)
            self._file.write(struct.pack("<I", _masked_crc(part)))

    def close(self) -> None:
        self._file.close()


def create_shard(path: Path, file_format: str) -> RecordWriter:
    """A new shard, "tfrecord" or "array_record", in which each record can be found by itself."""
    if file_format == "tfrecord":
        return TFRecordWriter(path)
    writer: Any = ArrayRecordWriter(str(path), "group_size:1")
    return writer  # type: ignore[no-any-return]


def _masked_crc(data: bytes) -> int:
    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
