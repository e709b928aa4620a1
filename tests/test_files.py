"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvla.files import appearing, locked, remove_remainders, replacing, write_text


def test_a_file_appears_when_its_block_has_ended_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_what_was_there_stays_if_the_block_fails(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last to end"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_holds_the_text_already_is_left_alone(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "Zürich\n")
    before = path.stat()
    assert write_text(path, "Zürich\n").stat().st_ino == before.st_ino
    assert write_text(path, "Bern\n").stat().st_ino != before.st_ino
    assert path.read_text(encoding="utf-8") == "Bern\n"


def test_a_directory_appears_whole_and_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with appearing(tmp_path / "d") as building:
            (building / "a.txt").write_text(content)
        assert (tmp_path / "d" / "a.txt").read_text() == content

    def fail() -> None:
        with appearing(tmp_path / "d") as building:
            (building / "a.txt").write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert (tmp_path / "d" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_lock_is_held_by_one_and_dropped_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    with locked(path, wait=False):
        pass


def test_remainders_of_one_target_are_removed_and_no_others(tmp_path: Path) -> None:
    (tmp_path / ".a.123.incomplete").mkdir()
    (tmp_path / ".a.123.part").write_text("half")
    (tmp_path / ".b.123.part").write_text("another's")
    remove_remainders(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [".b.123.part"]
