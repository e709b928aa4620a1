"""The records of a shard: written, and read in any order.

TFRecord is read through any file system, array_record on a local one.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import google_crc32c
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

_HEADER = struct.Struct("<QI")  # length of the record, masked checksum of these eight bytes
_FOOTER = struct.Struct("<I")
_MASK = 0xA282EAD8
#: A shard is scanned in pieces of so many bytes.
_PIECE = 1 << 20
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class CorruptRecordError(ValueError):
    """A record's length or checksum is wrong, or the file ends within it."""


class TFRecordShard:
    """A TFRecord file, uncompressed: every record behind its length, both with CRC-32C.

    Args:
        path: local path, or an address that fsspec knows (`s3://...`, `gs://...`).
    """

    def __init__(self, path: str) -> None:
        self._files, self._path = fsspec.core.url_to_fs(path)

    def places(self) -> Iterator[tuple[int, int]]:
        """Offset and size of each record, bytes. CorruptRecordError where what follows cannot be found."""
        size = int(self._files.size(self._path))
        with self._files.open(self._path, "rb", block_size=_PIECE) as file:
            offset = 0
            while offset < size:
                file.seek(offset)
                header = file.read(_HEADER.size)
                length = _length(header, offset)
                end = offset + _HEADER.size + length + _FOOTER.size
                if end > size:
                    raise CorruptRecordError(f"the file ends at byte {size}, within the record at byte {offset}")
                yield offset, end - offset
                offset = end

    def read(self, offset: int, size: int) -> bytes:
        """One record. CorruptRecordError if it is damaged."""
        framed = self._files.cat_file(self._path, start=offset, end=offset + size)
        if len(framed) != size or _length(framed[: _HEADER.size], offset) != size - _HEADER.size - _FOOTER.size:
            raise CorruptRecordError(f"no record of {size} bytes at byte {offset}")
        record = framed[_HEADER.size : -_FOOTER.size]
        if _FOOTER.unpack(framed[-_FOOTER.size :])[0] != _masked_crc(record):
            raise CorruptRecordError(f"wrong checksum of the record at byte {offset}")
        return bytes(record)


class ArrayRecordShard:
    """An array_record file, whose records have numbers; its reader knows local paths alone."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._left: list[Any] = []
        self._open()

    def __reduce__(self) -> tuple[type[ArrayRecordShard], tuple[str]]:
        return type(self), (self._path,)

    def places(self) -> Iterator[tuple[int, int]]:
        """The number of each record, and 0."""
        for number in range(self._reader.num_records() if self._reader.ok() else 0):
            yield number, 0

    def read(self, offset: int, size: int) -> bytes:
        """Record number `offset`. CorruptRecordError if it is damaged."""
        if self._process != os.getpid():
            self._left.append(self._reader)  # to end it would wait for threads that the fork has left behind
            self._open()
        try:
            with self._lock:
                return bytes(self._reader.read([offset])[0])
        except Exception as error:  # of no narrower type
            raise CorruptRecordError(str(error)) from error

    def _open(self) -> None:
        # forked processes would share one place in the file, and seek away beneath each other: each opens its own
        self._reader: Any = ArrayRecordReader(self._path, _RANDOM_ACCESS)
        self._lock = threading.Lock()  # the reader seeks
        self._process = os.getpid()


#: The records of one shard, by the place that `places` gave.
ShardRecords: TypeAlias = TFRecordShard | ArrayRecordShard


def open_shard(path: str, file_format: str) -> ShardRecords:
    """A shard in one of the formats "tfrecord" and "array_record"."""
    if file_format == "tfrecord":
        return TFRecordShard(path)
    return ArrayRecordShard(str(Path(path)))


def _length(header: bytes, offset: int) -> int:
    if len(header) < _HEADER.size:
        raise CorruptRecordError(f"the file ends within the header at byte {offset}")
    length, crc = _HEADER.unpack(header)
    if crc != _masked_crc(header[:8]):
        raise CorruptRecordError(f"wrong checksum of the length at byte {offset}")
    return int(length)


def _masked_crc(data: bytes) -> int:
    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


class TFRecordWriter:
    """An uncompressed TFRecord file: each record behind its length, both with CRC-32C (tensorflow/core/lib/io)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, record: bytes) -> None:
        length = struct.pack("<Q", len(record))
        for part in (length, record):
            self._file.write(part)
            self._file.write(_FOOTER.pack(_masked_crc(part)))

    def close(self) -> None:
        self._file.close()


def create_shard(path: Path, file_format: str) -> Any:
    """A new shard, "tfrecord" or "array_record", to `write` records to; whole only after `close`."""
    if file_format == "tfrecord":
        return TFRecordWriter(path)
    return ArrayRecordWriter(str(path), "group_size:1")  # so that each record can be found by itself
