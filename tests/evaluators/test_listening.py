"""What becomes of success with other goals and other words: what is counted, and against what."""

from __future__ import annotations

import pytest
from rich.console import Console

from evaluators.listening import ALL, Listening, listening, listening_table
from evaluators.success_table import SuccessTable
from ipvla.types import EpisodeResult, EpisodeSpec


def results(task: str, done: str, old: str = "") -> list[EpisodeResult]:
    """An episode per letter: x for success; where `old` is given, x for the scene's own goal."""
    return [
        EpisodeResult(
            EpisodeSpec("recall", task, seed, seed),
            "success" if letter == "x" else "failure",
            9,
            3,
            1.0,
            0.5,
            details={"scene_goal": old[seed] == "x"} if old else {},
        )
        for seed, letter in enumerate(done)
    ]


def table(*groups: list[EpisodeResult]) -> SuccessTable:
    return SuccessTable("p", (), (), tuple(result for group in groups for result in group), {"suite": "recall"})


def told(*groups: list[EpisodeResult]) -> Listening:
    return listening("p", [table(*groups)])


def test_who_hears_and_who_does_not() -> None:
    own = results("red", "xxxx")
    hears = told(own, results("blue-in-red", "xxxx", "...."))
    deaf = told(own, results("blue-in-red", "....", "xxxx"))
    assert [hears.overall(name).counts.rate for name in ("own", "other_goal", "old_goal")] == [1, 1, 0]
    assert [deaf.overall(name).counts.rate for name in ("own", "other_goal", "old_goal")] == [1, 0, 1]
    assert deaf.overall("other_goal").difference == -1
    assert deaf.overall("old_goal").difference == 0, "as ever"
    assert deaf.overall("own").difference is None
    with pytest.raises(KeyError):
        hears.overall("action")


def test_differences_are_on_the_initial_states_that_both_have_played() -> None:
    found = told(results("red", "xx.."), results("red-said-object", "x....."), results("red-said-action", "xx.."))
    assert (found.overall("object").counts.k, found.overall("object").counts.n) == (1, 6)
    assert found.overall("object").difference == -0.25
    low, high = found.overall("object").difference95 or (0, 0)
    assert low < -0.25 < high
    assert found.overall("action").difference == 0
    assert told(results("red-said-action", "x")).overall("action").difference is None


def test_several_goals_of_a_scene_are_one_value_for_its_initial_state() -> None:
    groups = results("red", "xx"), results("blue-in-red", "x.", ".x"), results("green-in-red", "x.", "..")
    found = told(*groups, results("green", ".."), results("red-in-green", "..", "xx"))
    scene = {row.counts.name: row for row in found.rows if row.scene == "red"}
    assert (scene["other_goal"].counts.k, scene["other_goal"].counts.n) == (2, 4)
    assert scene["other_goal"].difference == -0.5
    assert found.overall("other_goal").difference == -0.25, "of four initial states of two scenes"
    assert [row.scene for row in found.rows if row.counts.name == "own"] == ["red", "green", ALL]


def test_what_is_shown_and_logged() -> None:
    found = told(
        results("red", "xxxx"), results("blue-in-red", "x...", ".xx."), results("red-said-object", "xxx.")
    )
    metrics = found.metrics("recall")
    assert metrics["listening/recall/other_goal"] == metrics["listening/recall/other_goal/red"] == 0.25
    assert metrics["listening/recall/old_goal"] == 0.5
    assert metrics["listening/recall/object/difference"] == -0.25
    assert metrics["listening/recall/own/low"] < 1 == metrics["listening/recall/own/high"]
    console = Console(record=True, width=160, quiet=True)
    console.print(listening_table(found))
    (row,) = (row for row in found.to_dict()["rows"] if (row["scene"], row["measure"]) == (ALL, "object"))
    assert (row["k"], row["n"]) == (3, 4)
    with pytest.raises(ValueError, match="play at least one"):
        listening("p", [table()])
