"""Reasoning in words: ECoT's tags in their order, nothing lost, and what stage and dropout leave out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.data.reasoning.steps import TAGS, ReasoningFilter, render, step_parts
from ipvla.data.reasoning.store import pack, unpack
from ipvla.reasoning import TAGS as OUR_TAGS
from ipvla.reasoning import ReasoningError, parse

SAID = {
    "task": "put the cup on the plate",
    "plan": "1. reach 2. grasp",
    "subtask_reason": "the cup is not held",
    "subtask": "reach",
    "move_reason": "the cup is to the left",
    "move": "move left",
}
FEATURES = {
    "bboxes": [[[0.9, "a cup", [1, 2, 30, 40]], [0.5, "plate", [5, 6, 7, 8]]], []],
    "gripper_position": [[10, 20], [11, 21], [12, 22]],
}
FULL = (
    "TASK: put the cup on the plate PLAN: 1. reach 2. grasp "
    "VISIBLE OBJECTS: a cup [1, 2, 30, 40], plate [5, 6, 7, 8] "
    "SUBTASK REASONING: the cup is not held SUBTASK: reach "
    "MOVE REASONING: the cup is to the left MOVE: move left "
    "GRIPPER POSITION: [10, 20, 11, 21, 12, 22, 12, 22, 12, 22]"
)

#: Any text but surrogates, which JSON files in UTF-8 cannot hold.
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_parts = st.dictionaries(st.sampled_from(TAGS), _texts.filter(lambda text: text.strip() == text != ""))


def test_one_step_reads_in_ecots_order() -> None:
    assert render(step_parts(SAID, FEATURES, 0)) == FULL


def test_the_tags_are_those_that_the_project_knows() -> None:
    assert set(TAGS) == set(OUR_TAGS)


@pytest.mark.parametrize("missing", sorted(SAID))
def test_a_missing_key_leaves_its_tag_out(missing: str) -> None:
    for said in ({k: v for k, v in SAID.items() if k != missing}, SAID | {missing: None}, SAID | {missing: " "}):
        parts = step_parts(said, FEATURES, 0)
        assert len(parts) == len(TAGS) - 1
        assert SAID[missing] not in parts.values()
        assert parse(render(parts)) == parts


@pytest.mark.parametrize("features", [{}, {"bboxes": None, "gripper_position": None}, {"bboxes": [[]]}])
def test_missing_features_leave_their_tags_out(features: dict[str, object]) -> None:
    assert list(step_parts(SAID, features, 0)) == [
        t for t in TAGS if t not in ("VISIBLE OBJECTS", "GRIPPER POSITION")
    ]


def test_a_step_past_the_features_has_none() -> None:
    assert not {"VISIBLE OBJECTS", "GRIPPER POSITION"} & set(step_parts(SAID, FEATURES, 3))


def test_the_libero_files_names_are_known() -> None:
    said = {"movement": "move left", "movement_reason": "the cup is left", "subtask_reasoning": "not held"}
    assert step_parts(said, {"gripper_positions": [[1, 2]]}, 0) == {
        "SUBTASK REASONING": "not held",
        "MOVE REASONING": "the cup is left",
        "MOVE": "move left",
        "GRIPPER POSITION": "[1, 2, 1, 2, 1, 2, 1, 2, 1, 2]",
    }


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(sorted(SAID)), _texts))
def test_words_are_kept_to_the_letter(said: dict[str, str]) -> None:
    parts = step_parts(said, {}, 0)
    assert sorted(parts.values()) == sorted(text.strip() for text in said.values() if text.strip())
    assert all(f"{tag}: {text}" in render(parts) for tag, text in parts.items())


@settings(deadline=None, max_examples=50)
@given(_parts)
def test_the_text_reads_back_where_no_words_look_like_a_tag(parts: dict[str, str]) -> None:
    try:
        read = parse(render(parts))
    except ReasoningError:
        return  # nothing to read, or a tag within
    assert list(read) == [tag for tag in TAGS if tag in parts]
    assert dict(read) == {tag: " ".join(text.split()) for tag, text in parts.items()}


def test_an_at_sign_separates_nothing() -> None:
    parts = step_parts({"task": "a@b @ c", "plan": "@"}, {}, 0)
    assert render(parts) == "TASK: a@b @ c PLAN: @"
    assert parse(render(parts)) == parts


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.integers(0, 500), _parts, max_size=5))
def test_an_episode_comes_back_from_its_row(said: dict[int, dict[str, str]]) -> None:
    assert unpack(pack(said)) == said


@pytest.mark.parametrize("stage", [0, 3, 7, 8, 50])
def test_a_stage_leaves_out_the_first_tags(stage: int) -> None:
    parts = step_parts(SAID, FEATURES, 0)
    assert list(ReasoningFilter(stage)(parts)) == list(TAGS[stage:])


def test_a_stage_counts_tags_that_are_missing_too() -> None:
    assert list(ReasoningFilter(3)({"PLAN": "a", "SUBTASK": "b"})) == ["SUBTASK"]


def test_zero_keeps_all_and_one_drops_all() -> None:
    parts = step_parts(SAID, FEATURES, 0)
    for key in range(50):
        assert ReasoningFilter(0, 0.0)(parts, (key,)) == parts
        assert ReasoningFilter(0, 1.0)(parts, (key,)) == {}


def test_the_number_is_the_probability_of_dropping_each_tag() -> None:
    parts = step_parts(SAID, FEATURES, 0)
    kept = Counter(tag for key in range(4000) for tag in ReasoningFilter(0, 0.2)(parts, (1, key)))
    assert all(abs(kept[tag] / 4000 - 0.8) < 0.03 for tag in TAGS)


def test_tags_are_dropped_independently() -> None:
    parts = step_parts(SAID, FEATURES, 0)
    both = sum({"TASK", "PLAN"} <= set(ReasoningFilter(0, 0.5)(parts, (key,))) for key in range(4000))
    assert abs(both / 4000 - 0.25) < 0.03


def test_dropout_comes_after_the_stage_and_a_missing_key_moves_no_ones_luck() -> None:
    parts = step_parts(SAID, FEATURES, 0)
    for key in range(30):
        whole = ReasoningFilter(0, 0.5)(parts, (key,))
        assert ReasoningFilter(3, 0.5)(parts, (key,)) == {tag: whole[tag] for tag in TAGS[3:] if tag in whole}
        without = {tag: text for tag, text in parts.items() if tag != "SUBTASK"}
        expected = {tag: text for tag, text in whole.items() if tag != "SUBTASK"}
        assert ReasoningFilter(0, 0.5)(without, (key,)) == expected


def test_the_same_key_draws_the_same_and_another_one_others() -> None:
    parts = step_parts(SAID, FEATURES, 0)
    draws = [tuple(ReasoningFilter(0, 0.5)(parts, (0, key))) for key in range(20)]
    assert draws == [tuple(ReasoningFilter(0, 0.5)(parts, (0, key))) for key in range(20)]
    assert len(set(draws)) > 10


@pytest.mark.parametrize(("stage", "probability"), [(-1, 0.0), (0, -0.1), (0, 1.5), (0, float("nan"))])
def test_a_filter_that_cannot_be_is_refused(stage: int, probability: float) -> None:
    with pytest.raises(ValueError, match=r"scheduled_stage is -1|reasoning_dropout_prob is"):
        ReasoningFilter(stage, probability)
