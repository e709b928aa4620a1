"""Studies count the seeds of one recipe together, and compare what their YAML files name."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from studies import record
from studies.engine import entries, publish, same_recipe
from studies.forgetting import ForgettingStudy
from studies.memory import MemoryStudy
from studies.record import Target, read_record, write_record

QUIET = Console(quiet=True)


def targets(figures: dict[str, Any]) -> list[Target]:
    return [Target("sum", figures["sum"], 3, at_least=True)]


def add(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    return {**later, "sum": earlier["sum"] + later["sum"]}


def test_seeds_of_a_recipe_join_and_those_of_another_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    recipe = MemoryStudy(storage_root=tmp_path).recipe
    before = deepcopy(recipe)
    del before["training"]["optimizer"]["final_lr_share"]
    write_record("made_up", [0, 2], {"recipe": before, "sum": 1}, [])
    both = publish("made_up", [1], {"recipe": recipe, "sum": 2}, add, targets, QUIET)
    written = read_record("made_up")
    assert written is not None
    assert both["sum"] == written["figures"]["sum"] == 3
    assert written["seeds"] == [0, 1, 2]
    assert len(written["runs"]) == 2
    assert written["targets"][0]["met"]
    other = {**recipe, "suite_version": "0"}
    assert publish("made_up", [5], {"recipe": other, "sum": 2}, add, targets, QUIET)["sum"] == 2
    assert json.loads((tmp_path / "made_up.json").read_text())["seeds"] == [5]


@pytest.mark.parametrize("study", [MemoryStudy, ForgettingStudy])
def test_new_seeds_join_the_published_record(study: type[MemoryStudy | ForgettingStudy], tmp_path: Path) -> None:
    published = read_record(study.title)
    assert published is not None
    assert same_recipe(published["figures"]["recipe"], study(storage_root=tmp_path).recipe)


def test_an_entry_more_is_a_row_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entries("memory"), "small", {"type": "gru", "hidden": 8})  # type: ignore[arg-type]
    study = MemoryStudy(storage_root=tmp_path)
    assert study.names[-1] == "small"
    assert study.complete
    small, gru = (study.training(name, 0) for name in ("small", "gru"))
    assert small.model.memory != gru.model.memory
    assert type(small.model.memory) is type(gru.model.memory)
