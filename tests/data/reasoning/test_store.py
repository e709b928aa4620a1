"""A reasoning file is compiled once, found by episode, and fetched where it is missing."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from ipvla.data.reasoning import store as module
from ipvla.data.reasoning.steps import step_parts
from ipvla.data.reasoning.store import (
    MissingReasoningError,
    ReasoningStore,
    along,
    compile_reasoning,
    database_path,
    open_store,
)
from ipvla.data.source import DatasetError
from tests.data.reasoning import bridge


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return bridge.write_reasoning(tmp_path / "reasoning.json")


@pytest.fixture
def store(file: Path, tmp_path: Path) -> ReasoningStore:
    return ReasoningStore(compile_reasoning(file, tmp_path / "cache"))


def test_every_step_of_every_episode_is_found(store: ReasoningStore) -> None:
    whole = bridge.reasoning()
    for episode, length in enumerate(bridge.LENGTHS):
        found = store.of(bridge.metadata(episode))
        where = bridge.metadata(episode)
        features = whole[where["file_path"]][str(where["episode_id"])]["features"]
        written = {
            step: step_parts(bridge.said(episode, step), features, step)
            for step in range(length)
            if episode != bridge.SILENT and (episode, step) != bridge.MISSING_STEP
        }
        assert found == written
    assert len(store) == len(bridge.LENGTHS) - 1


def test_what_is_not_there_is_empty(store: ReasoningStore) -> None:
    assert store.episode("/nfs/bridge/0/out.npy", "7") == {}
    assert store.episode("elsewhere", "100") == {}
    assert store.of({}) == {}
    assert store.of({"file_path": "/nfs/bridge/0/out.npy"}) == {}


@pytest.mark.parametrize("number", [100, np.int32(100), np.array([100]), "100"])
def test_an_episodes_number_may_have_any_type(store: ReasoningStore, number: object) -> None:
    assert store.of({"file_path": "/nfs/bridge/0/out.npy", "episode_id": number})


def test_libero_files_have_their_steps_without_a_layer_between(tmp_path: Path) -> None:
    path = tmp_path / "libero.json"
    path.write_text(json.dumps({"a_demo.hdf5": {"3": {"0": {"plan": "p"}, "1": {"movement": "m"}}}}))
    store = ReasoningStore(compile_reasoning(path, tmp_path))
    assert store.of({"file_path": "a_demo.hdf5", "demo_id": 3}) == {0: {"PLAN": "p"}, 1: {"MOVE": "m"}}


def test_kept_steps_are_looked_up_by_the_datasets_own_number() -> None:
    said = {0: {"PLAN": "zero"}, 1: {"PLAN": "one"}, 3: {"PLAN": "three"}}
    assert along(said, np.array([1, 2, 3])) == [{"PLAN": "one"}, {}, {"PLAN": "three"}]


def test_a_file_is_compiled_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_reasoning(file, tmp_path / "cache")
    monkeypatch.setattr(module, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_reasoning(file, tmp_path / "cache") == first
    assert [p.name for p in (tmp_path / "cache").glob("*.sqlite")] == [first.name]


def test_another_file_under_the_same_name_is_compiled_anew(file: Path, tmp_path: Path) -> None:
    first = compile_reasoning(file, tmp_path / "cache")
    bridge.write_reasoning(file, (3,))
    second = compile_reasoning(file, tmp_path / "cache")
    assert second != first
    assert len(ReasoningStore(second)) == 1


def test_a_touched_file_counts_as_another_one(file: Path, tmp_path: Path) -> None:
    before = database_path(file, tmp_path)
    os.utime(file, ns=(0, time.time_ns()))
    assert database_path(file, tmp_path) != before


def test_of_many_at_once_one_compiles(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, times = module._compile, []
    monkeypatch.setattr(module, "_compile", lambda *args: (times.append(1), time.sleep(0.1), compile_(*args)))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: compile_reasoning(file, tmp_path / "cache"), range(6)))
    assert len(set(found)) == len(times) == 1


def test_an_interrupted_compilation_leaves_nothing_behind(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> object:
        yield "/a", "1", {0: {"PLAN": "p"}}
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_episodes", stopped)
        with pytest.raises(KeyboardInterrupt):
            compile_reasoning(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*sqlite*"))
    assert len(ReasoningStore(compile_reasoning(file, tmp_path / "cache"))) == len(bridge.LENGTHS) - 1


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"a": 3}', '{"a": {"1": {"reasoning": {"0": {"plan": "p"}}}']
)
def test_a_damaged_file_is_an_error_and_not_a_fallback(tmp_path: Path, content: str) -> None:
    path = tmp_path / "reasoning.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"reasoning\.json"):
        open_store(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*sqlite*"))


UNMATCHED = [
    ({}, "the metadata has no file_path", "it has none"),
    ({"file_path": "a"}, "the metadata has no episode_id or demo_id", "it has file_path"),
    (
        {"file_path": "a", "episode_id": 3},
        "no such file_path",
        "'a' in the dataset, '/nfs/bridge/0/out.npy' in the",
    ),
    (
        {"file_path": "/nfs/bridge/0/out.npy", "episode_id": 7},
        "no such episode of that file_path",
        "7 of '/nfs/bridge/0/out.npy' in the dataset, 100, 102 in the reasoning file",
    ),
]


@pytest.mark.parametrize(("metadata", "reason", "example"), UNMATCHED)
def test_why_an_episode_has_no_reasoning(
    store: ReasoningStore, metadata: dict[str, object], reason: str, example: str
) -> None:
    unmatched = store.unmatched(metadata)
    assert unmatched.reason == reason
    assert unmatched.example.startswith(example)


def test_threads_and_processes_read_the_same_store(store: ReasoningStore) -> None:
    expected = store.of(bridge.metadata(0))  # the parent has a connection when it forks
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(store.of, [bridge.metadata(0)] * 16))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as processes:
            assert processes.map(store.of, [bridge.metadata(0)] * 2) == [expected] * 2
    assert pickle.loads(pickle.dumps(store)).of(bridge.metadata(0)) == expected


def test_an_unknown_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingReasoningError, match=r"mine\.json does not exist, and only .*embodied_features_br"):
        open_store(tmp_path / "mine.json", tmp_path)


def test_a_compiled_file_is_opened_as_it_is_and_a_damaged_one_refused(file: Path, tmp_path: Path) -> None:
    database = compile_reasoning(file, tmp_path / "cache")
    assert open_store(database, tmp_path / "other").of(bridge.metadata(0))
    assert not (tmp_path / "other").exists()
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"no database" * 100)
    with pytest.raises(DatasetError, match=r"damaged\.sqlite is no compiled reasoning"):
        open_store(damaged, tmp_path / "other")


def test_a_published_file_that_is_missing_is_fetched(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    store = open_store(tmp_path / "no" / "embodied_features_bridge.json", tmp_path / "cache")
    assert len(store) == len(bridge.LENGTHS) - 1
    assert asked == [("Embodied-CoT/embodied_features_bridge", "embodied_features_bridge.json", "dataset")]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no connection"), OSError("disk is full"), OSError()])
def test_a_fetch_that_fails_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(
        MissingReasoningError, match="cannot be fetched from Embodied-CoT/embodied_features_bridge"
    ):
        open_store(tmp_path / "embodied_features_bridge.json", tmp_path)
