"""The sets of instructions: what is said in other words, and what could be done in the same scene instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ipvla.sim.instructions.sets import InstructionsError, InstructionSet, instruction_set, known_sets, set_for
from ipvla.sim.recall.tasks import TASKS, RecallTask
from ipvla.sim.simulator import Task
from ipvla.sim.standard.tasks import bddl_file, standard_tasks


def tasks_of(suite: str) -> tuple[Task, ...]:
    return TASKS if suite == "recall" else standard_tasks(suite)


def task_saying(suite: str, text: str) -> Task:
    (task,) = (task for task in tasks_of(suite) if text in task.phrasings)
    return task


@pytest.mark.parametrize("suite", known_sets())
def test_its_instructions_are_what_the_suites_demonstrations_say(suite: str) -> None:
    for wording in instruction_set(suite).wordings:
        task = task_saying(suite, wording.instruction)
        assert all(instruction_set(suite).find(phrasing) == wording for phrasing in task.phrasings)
        assert not set(wording.all_synonyms) & set(task.phrasings), "what training has said is no other words"


@pytest.mark.parametrize("suite", ["libero_goal", "libero_object"])
def test_all_goals_of_a_suite_of_libero_have_words(suite: str) -> None:
    assert len(instruction_set(suite).wordings) == len(standard_tasks(suite)) == 10


@pytest.mark.parametrize("suite", known_sets())
def test_opposites_are_goals_that_the_same_scene_allows(suite: str) -> None:
    for wording in instruction_set(suite).wordings:
        scene = task_saying(suite, wording.instruction)
        for text in wording.opposites:
            other = task_saying(suite, text)
            if isinstance(scene, RecallTask) and isinstance(other, RecallTask):
                wanted = {other.objects[i] for i in other.program}
                assert wanted <= set(scene.objects)
                assert other.program != scene.program or other.objects != scene.objects
                continue
            there, wants = (bddl_file(suite, task.name).read_text() for task in (scene, other))
            found = re.search(r"\(:goal\s*\(And \(\w+ ([^)]*)\)", wants)
            assert found is not None
            things = {re.sub(r"_\d+(_\w+)?$", "", name) for name in found[1].split()} - {"main_table"}
            assert things, text
            assert all(re.search(rf"\b{thing}_1 - |\b{thing}\b", there) for thing in things), (wording, text)


def test_a_text_is_found_whatever_its_case_and_spaces() -> None:
    goal = instruction_set("libero_goal")
    found = goal.find(" Put the bowl  on the plate")
    assert found is not None
    assert found.instruction == "put the bowl on the plate"
    assert goal.find("Put the bowl on the top of the drawer") is goal.find("put the bowl on top of the cabinet")
    assert goal.find("dance") is None


def test_data_get_the_set_that_knows_them() -> None:
    assert set_for({"turn on the stove", "dance"}).path.stem == "libero_goal"
    with pytest.raises(InstructionsError, match=r"such as 'dance'; write one .* --instructions"):
        set_for({"dance"})
    with pytest.raises(InstructionsError, match=r"libero_gaol has no set .*; did you mean 'libero_goal'"):
        instruction_set("libero_gaol")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("go: {action: [walk]}", r"has no map `instructions`"),
        ("instructions: {}", "is empty"),
        ("instructions: {go: {action: [walk]}}", r"mine\.yaml: 'go' has no opposites; give one"),
        ("instructions: {go: {action: [walk], opposites: []}}", "'go' has no opposites"),
        ("instructions: {go: {opposites: [stop]}}", "'go' has no synonyms"),
        ("instructions: {go: {action: [walk], opposites: [Walk]}}", "an opposite of 'go' means the same"),
        ("instructions: {go: {action: [walk], opposites: [go]}}", "an opposite of 'go' means the same"),
        ("instructions: {go: {acton: [walk], opposites: [stop]}}", "'go' has 'acton'; did you mean 'action'"),
        ("instructions: {go: {action: walk, opposites: [stop]}}", "action of 'go' is no list"),
        ("instructions: {go: {action: [3], opposites: [stop]}}", "holds 3, which is no text"),
        ("instructions: {go: [walk]}", "'go' has no map of"),
        ("{one_scene: 7, instructions: {go: {action: [walk], opposites: [stop]}}}", "one_scene is 7"),
        ("{scene: 1, instructions: {go: {action: [walk], opposites: [stop]}}}", "'scene' is neither"),
        ("[", "is no set of instructions"),
    ],
)
def test_what_is_no_set_is_refused_in_a_line_with_the_file(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InstructionsError, match=reason) as told:
        InstructionSet.load(path)
    assert "mine.yaml" in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(InstructionsError, match="is no set of instructions"):
        InstructionSet.load(tmp_path / "nothing.yaml")
