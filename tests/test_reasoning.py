"""Reasoning in ECoT's tag format: what is formatted parses to itself, and what is no reasoning says why."""

from __future__ import annotations

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from ipvla.reasoning import TAGS, Reasoning, ReasoningError, parse, without_last_part

WORDS = st.text(max_size=20) | st.lists(
    st.sampled_from(["press", "red", "2", "Task", "sub", "MOVE", "visible"])
).map(" ".join)


@st.composite
def reasonings(draw: st.DrawFn) -> Reasoning:
    tags = draw(st.lists(st.sampled_from(TAGS), min_size=1, unique=True))
    try:
        return Reasoning({tag: draw(WORDS) for tag in tags})
    except ReasoningError:
        reject()


@given(reasonings())
def test_what_is_formatted_parses_to_itself(reasoning: Reasoning) -> None:
    again = parse(reasoning.format())
    assert again == reasoning
    assert list(again) == list(reasoning)
    assert again.format() == reasoning.format()


@given(st.text(max_size=40) | st.lists(st.sampled_from([*TAGS, ":", "press", " "])).map(" ".join))
def test_any_text_parses_to_what_formats_back_or_is_refused(text: str) -> None:
    try:
        reasoning = parse(text)
    except ReasoningError:
        return
    assert parse(reasoning.format()) == reasoning


def test_a_plan_of_the_recall_suite() -> None:
    reasoning = parse("PLAN: red red blue SUBTASK: 2 press red")
    assert dict(reasoning) == {"PLAN": "red red blue", "SUBTASK": "2 press red"}
    assert reasoning.format() == "PLAN: red red blue SUBTASK: 2 press red"


def test_every_tag_of_ecot_is_told_from_those_within_it() -> None:
    text = " ".join(f"{tag}: {number}" for number, tag in enumerate(TAGS))
    assert dict(parse(text)) == {tag: str(number) for number, tag in enumerate(TAGS)}


def test_case_and_spacing_do_not_matter_as_tokenizers_change_both() -> None:
    assert parse("plan : press red\nsubtask : 1  press red ") == parse("PLAN: press red SUBTASK: 1 press red")


def test_the_names_of_tags_are_ordinary_words_where_no_colon_follows() -> None:
    assert parse("PLAN: plan the next task SUBTASK: move on")["PLAN"] == "plan the next task"


def test_other_parts_than_plan_and_subtask_may_be_empty() -> None:
    assert dict(parse("PLAN: go VISIBLE OBJECTS:")) == {"PLAN": "go", "VISIBLE OBJECTS": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no tag in ''"),
        ("press red", "no tag in 'press red'; write 'TAG: text'"),
        ("GOAL: press red", "no tag in"),
        ("press PLAN: red", "has 'press' before its first tag"),
        ("PLAN: red PLAN: blue", "has the tag PLAN 2 times"),
        ("PLAN: SUBTASK: 1 press red", "PLAN is empty"),
        ("PLAN: red subtask :", "SUBTASK is empty"),
    ],
)
def test_what_does_not_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ReasoningError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "without parts"),
        ({"GOAL": "press red"}, "unknown tag 'GOAL'"),
        ({"plan": "press red"}, "unknown tag 'plan'"),
        ({"PLAN": "red", "SUBTASK": " "}, "SUBTASK is empty"),
        ({"PLAN": "press. Task: red"}, "with the tag 'Task:' within"),
    ],
)
def test_parts_that_could_not_be_read_back_are_refused(parts: dict[str, str], message: str) -> None:
    with pytest.raises(ReasoningError, match=message):
        Reasoning(parts)


def test_parts_are_taken_from_the_end_of_a_text() -> None:
    text = "PLAN: red red blue SUBTASK: 2 press red MOVE REASONING: it is near"
    assert without_last_part(text) == "PLAN: red red blue SUBTASK: 2 press red"
    assert without_last_part("PLAN: red") == without_last_part("no tag") == ""
