"""TFRecord shards: every record by its place, and no damaged byte goes unnoticed."""

from __future__ import annotations

import struct
from pathlib import Path

import fsspec
import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.data.rlds.records import CorruptRecordError, TFRecordShard

RECORDS = st.lists(st.binary(max_size=40), min_size=1, max_size=6)


def framed(record: bytes) -> bytes:
    """As TensorFlow's documentation of the format has it."""

    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


def shard(content: bytes) -> TFRecordShard:
    """In fsspec's own memory, so that nothing rests on local files."""
    fsspec.filesystem("memory").pipe_file("/shard.tfrecord", content)
    return TFRecordShard("memory://shard.tfrecord")


@given(RECORDS)
def test_every_record_is_read_back_in_any_order(records: list[bytes]) -> None:
    opened = shard(b"".join(map(framed, records)))
    places = list(opened.places())
    assert [opened.read(*place) for place in reversed(places)] == records[::-1]


@given(RECORDS, st.data())
def test_any_changed_byte_is_noticed(records: list[bytes], data: st.DataObject) -> None:
    content = bytearray(b"".join(map(framed, records)))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    opened = shard(bytes(content))
    with pytest.raises(CorruptRecordError):
        [opened.read(*place) for place in opened.places()]


@given(RECORDS, st.data())
def test_a_file_that_ends_within_a_record_is_noticed(records: list[bytes], data: st.DataObject) -> None:
    content = b"".join(map(framed, records))
    ends = {sum(len(framed(record)) for record in records[:n]) for n in range(len(records) + 1)}
    cut = data.draw(st.integers(0, len(content) - 1).filter(lambda at: at not in ends))
    with pytest.raises(CorruptRecordError, match="ends"):
        list(shard(content[:cut]).places())


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.tfrecord"
    path.write_bytes(framed(b"one") + framed(b"two"))
    with pytest.raises(CorruptRecordError):
        TFRecordShard(str(path)).read(3, 19)
