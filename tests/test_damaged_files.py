"""Journals, statistics, settings and artifacts that are damaged in any way: read, or refused by one line, soon."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.damage import Trials, damaged
from ipvla import plain_yaml
from ipvla.data.statistics import Statistics
from ipvla.files import read_record
from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.fisher import DiagonalFisher
from ipvla.plain_yaml import YamlError
from ipvla.rollout.journal import Journal, JournalError
from ipvla.sim.gym.settings import GymError, GymSettings
from ipvla.storage import SOURCE_TREE
from ipvla.types import EpisodeResult, EpisodeSpec, EpisodeTrace
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import SettingError, parse

FINGERPRINT = {"protocol": "held-out-1", "policy": "abc"}
PRESET = SOURCE_TREE / "ray_jobs" / "experiments" / "quickstart" / "full" / "collect.yaml"
GYM = SOURCE_TREE / "ray_jobs" / "experiments" / "gym_aloha" / "aloha.yaml"


#: Eight lists, each of eight times the one before: 8^8 values.
LAUGHS = "a: &a [x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{name}'] * 8)}]\n"
    for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)


def played(trial: int) -> EpisodeResult:
    spec = EpisodeSpec("recall", "ground_red", seed=1000 + trial, trial=trial)
    trace = EpisodeTrace(
        np.zeros((9, 7), np.float32), np.ones(9, np.float32), np.arange(2, dtype=np.int32), np.ones(2, np.float32)
    )
    return EpisodeResult(spec, "success", 9, 2, 0.5, 0.1, details={"at": [1, 2]}, trace=trace)


def journal(path: Path) -> Path:
    with Journal(path, FINGERPRINT) as records:
        for trial in range(12):
            records.record(played(trial))
    return path


def statistics(path: Path) -> Path:
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(40, 7)).astype(np.float32)]
    Statistics.compute(values, values).save(path, "cue")
    return path


def artifact(path: Path) -> Path:
    DiagonalFisher({"backbone": "tiny", "width": 3}, {"a": torch.ones(3)}).save(path.parent)
    return path.parent / "fisher.json"


def read_journal(path: Path) -> None:
    with Journal.existing(path) as records:
        for result in records.results():
            records.trace(result.spec)
        records.missing([played(0).spec])


def copied(source: Path) -> Callable[[Path], Path]:
    def copy(path: Path) -> Path:
        path.write_bytes(source.read_bytes())
        return path

    return copy


LOADERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object], type[Exception]]] = {
    "journal": (journal, read_journal, JournalError),
    "statistics": (statistics, lambda path: Statistics.load(path, 7), ValueError),
    "artifact": (artifact, lambda path: DiagonalFisher.load(path.parent, {"width": 3}), ArtifactError),
    "settings": (copied(PRESET), lambda path: parse(CollectConfig, ["--config_path", str(path)]), SettingError),
    "gymnasium": (copied(GYM), GymSettings.load, GymError),
}


@pytest.mark.parametrize("name", LOADERS)
def test_whatever_happens_to_a_file_it_is_read_or_refused(name: str, tmp_path: Path) -> None:
    make, load, promised = LOADERS[name]
    path = make(tmp_path / "file")
    content, rng = path.read_bytes(), np.random.default_rng(0)
    trials = Trials(promised)
    for _ in range(60):
        path.write_bytes(damaged(content, rng))
        trials.load(lambda: load(path))
    assert trials.broken == []
    assert trials.refused > 10
    assert trials.slowest_s < 1
    path.unlink()
    os.mkfifo(path)
    if name != "journal":  # SQLite has an error of its own for it
        with pytest.raises(promised, match="regular file"):
            load(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: !include /etc/passwd", "'!include' is a tag"),
        ("name: !!python/name:os.system x", "python/name:os.system' is a tag"),
        ("name: !!python/object/apply:os.system [id]", "is a tag"),
        ("a: &a [*a]", "holds itself"),
        (LAUGHS, "more than 100000 values"),
        ("[" * 10**5, "nesting"),
        ("- " * 10**5, "maximum"),
        ("a: " + "1" * 5000, "4300 digits"),
        ("x" * 2**20 + "y", "at most 1048576 are read"),
        ("\x00", "character"),
    ],
)
def test_yaml_holds_plain_values(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(YamlError, match=reason):
        plain_yaml.load_file(path)
    with pytest.raises(SettingError, match="is not valid YAML"):
        parse(CollectConfig, ["--config_path", str(path)])


def test_yaml_repeats_a_value_by_its_name() -> None:
    assert plain_yaml.load("a: &a [1, 2.5, x]\nb: *a\nc: {<<: {d: 1}}") == {
        "a": [1, 2.5, "x"], "b": [1, 2.5, "x"], "c": {"d": 1}
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"[" * 10**6, b"[]", b"\xff", b"", b'{"a": ' + b"1" * 5000 + b"}"])
def test_a_record_is_an_object(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        read_record(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("result", "{}", "spec"),
        ("result", json.dumps({"spec": {}}), "EpisodeSpec"),
        ("result", "[" * 10**5, "recursion"),
        ("trace", b"PK", "zip"),
    ],
)
def test_a_record_of_another_form(column: str, value: str | bytes, reason: str, tmp_path: Path) -> None:
    path = journal(tmp_path / "j.sqlite")
    table = "traces" if column == "trace" else "episodes"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
    with pytest.raises(JournalError, match=reason):
        read_journal(path)


def test_a_trace_takes_no_more_room_than_an_episode_could(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipvla.rollout.journal._LARGEST_TRACE", 2**20)
    path, file = journal(tmp_path / "j.sqlite"), io.BytesIO()
    np.savez_compressed(file, actions=np.zeros((2**15, 10), np.float32))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE traces SET trace = ?", (file.getvalue(),))
    with pytest.raises(JournalError, match="a trace of 1310"):
        read_journal(path)


def test_a_journal_whose_schema_is_no_text_is_refused(tmp_path: Path) -> None:
    path = journal(tmp_path / "episodes.sqlite")
    path.write_bytes(path.read_bytes().replace(b"PRIMARY KEY", b"PRIMARY K\xe4Y"))
    with pytest.raises(JournalError, match="cannot be read"):
        read_journal(path)
    with pytest.raises(JournalError, match="cannot be read"), Journal(path, FINGERPRINT):
        pass


@pytest.mark.parametrize("name", ["h#1", "q?x=1", "p%20y", "a b", "мой ☃"])
def test_a_journals_path_may_have_any_letters(name: str, tmp_path: Path) -> None:
    path = journal(tmp_path / name / "episodes.sqlite")
    read_journal(path)
    with Journal.merged([path], tmp_path / name / "merged.sqlite") as merged:
        assert merged.results() == [replace(played(trial), trace=None) for trial in range(12)]
    assert [found.name for found in tmp_path.iterdir()] == [name]


def _as_nobody(path: Path) -> None:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    read_journal(path)


def test_another_users_journal_can_be_read(tmp_path: Path) -> None:
    path = journal(tmp_path / "j.sqlite")
    path.chmod(0o444)
    places = [tmp_path, *(place for place in tmp_path.parents if Path(tempfile.gettempdir()) in place.parents)]
    modes = [place.stat().st_mode for place in places]
    try:
        for place in places:
            place.chmod(0o555)
        reader = get_context("fork").Process(target=_as_nobody, args=(path,))
        reader.start()
        reader.join(30)
        assert reader.exitcode == 0
        assert [found.name for found in tmp_path.iterdir()] == ["j.sqlite"]
    finally:
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode)
