"""The list of a dataset's episodes: what is saved is loaded, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.data.rlds.index import EpisodeEntry, EpisodeIndex

ENTRIES = st.lists(
    st.builds(
        EpisodeEntry,
        shard=st.integers(0, 2**31 - 1),
        offset=st.integers(0, 2**62),
        size=st.integers(0, 2**40),
        steps=st.integers(1, 2**31 - 1),
        task=st.text(max_size=5),
        family=st.sampled_from(["", "ground", "recall"]),
    ),
    min_size=1,
    max_size=8,
)


@given(ENTRIES, st.lists(st.text(max_size=9), max_size=2))
def test_a_loaded_index_says_what_was_saved(entries: list[EpisodeEntry], broken: list[str]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "made" / "index.npy"
        EpisodeIndex.of(entries, broken).save(path)
        loaded = EpisodeIndex.load(path)
        assert loaded is not None
        assert loaded.lengths.tolist() == [entry.steps for entry in entries]
        assert loaded.tasks == tuple(entry.task for entry in entries)
        assert loaded.families == tuple(entry.family for entry in entries)
        assert loaded.broken == tuple(broken)
        for index, entry in enumerate(entries):
            assert loaded.place(index) == (entry.shard, entry.offset, entry.size)


@pytest.mark.parametrize("kept", [0, 60, 200])
def test_a_truncated_file_is_none(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "index.npy"
    EpisodeIndex.of([EpisodeEntry(0, 5, 7, 3, "a", "")] * 9).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    assert EpisodeIndex.load(path) is None


def test_where_nothing_was_saved_there_is_none(tmp_path: Path) -> None:
    assert EpisodeIndex.load(tmp_path / "index.npy") is None
