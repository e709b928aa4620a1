"""Plans say what has been shown so far, in ECoT's tags, and nothing of the future."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.models.backbones.tiny_tokenizer import tiny_tokenizer
from ipvla.reasoning import parse
from ipvla.sim.recall.episode import draw_episode
from ipvla.sim.recall.labels import plan_text
from ipvla.sim.recall.state_machine import StateMachine
from ipvla.sim.recall.tasks import TASKS

TASK = {task.name: task for task in TASKS}
CELLS = [(7, 12), (3, 4), (15, 0), (10, 11), (1, 9)]


def plans(name, presses=(), **drawn):
    """The plan at each step until the arm is free, then after each of the presses."""
    task = TASK[name]
    episode = replace(draw_episode(task, 0), **drawn)
    machine = StateMachine(task, episode.cues, episode.cue_at)
    told = []
    for _ in range(max(task.locked_steps, episode.cue_at) + 1):
        told.append(plan_text(episode, machine, CELLS))
        machine.advance(raised=True)
    for button in presses:
        machine.advance(touched=button)
        told.append(plan_text(episode, machine, CELLS))
        machine.advance(raised=True)
    return told


def changes(told):
    return [text for text, _ in groupby(told)]


def test_a_colour_is_called_by_its_name():
    assert plans("ground_yellow") == ["PLAN: press yellow SUBTASK: 1 press yellow"]


def test_a_count_tells_which_press_is_due():
    assert changes(plans("count_red2_blue1", [0, 0, 1])) == [
        "PLAN: red red blue SUBTASK: 1 press red",
        "PLAN: red red blue SUBTASK: 2 press red",
        "PLAN: red red blue SUBTASK: 3 press blue",
    ]


@pytest.mark.parametrize("name", ["recall", "recall_delay_200"])
def test_a_cue_is_told_by_its_cell_from_the_first_step_on(name):
    assert changes(plans(name, cues=(1,))) == ["PLAN: press 3 4 SUBTASK: 1 press 3 4"]


def test_items_are_told_all_at_once_and_struck_off_in_turn():
    assert changes(plans("items_2", [4, 0], cues=(4, 0))) == [
        "PLAN: press 1 9 7 12 SUBTASK: 1 press 1 9",
        "PLAN: press 1 9 7 12 SUBTASK: 2 press 7 12",
    ]


def test_items_pressed_in_another_order_leave_the_rest():
    assert plans("items_3", [0], cues=(4, 0, 1))[-1] == "PLAN: press 1 9 7 12 3 4 SUBTASK: 2 press 1 9"


def test_a_sequence_grows_as_it_is_shown():
    told = plans("order_3", [3, 0, 1], cues=(3, 0, 1))
    assert changes(told) == [
        "PLAN: press 10 11 SUBTASK: 1 press 10 11",
        "PLAN: press 10 11 7 12 SUBTASK: 1 press 10 11",
        "PLAN: press 10 11 7 12 3 4 SUBTASK: 1 press 10 11",
        "PLAN: press 10 11 7 12 3 4 SUBTASK: 2 press 7 12",
        "PLAN: press 10 11 7 12 3 4 SUBTASK: 3 press 3 4",
    ]
    assert [told.index(text) for text in changes(told)[:3]] == [0, 8, 16]


def test_a_cup_is_followed_when_its_swap_has_ended():
    told = plans("cups", cues=(0,), swaps=((1, 2), (2, 0)))
    assert changes(told) == ["PLAN: press 7 12 SUBTASK: 1 press 7 12", "PLAN: press 3 4 SUBTASK: 1 press 3 4"]
    task = TASK["cups"]
    assert told.index(changes(told)[1]) == task.swap_start(1) + task.swap_steps


def test_a_glimpse_is_waited_for():
    told = plans("glimpse", [1], cues=(1,), cue_at=12)
    assert changes(told) == [
        "PLAN: wait SUBTASK: 1 wait until button lights",
        "PLAN: press 3 4 SUBTASK: 1 press 3 4",
    ]
    assert told.index(changes(told)[1]) == 12


def test_a_delivery_is_to_pick_until_the_object_is_carried():
    task = TASK["place"]
    episode, machine = draw_episode(task, 0), StateMachine(task)
    assert plan_text(episode, machine, CELLS) == "PLAN: cube bowl SUBTASK: 1 pick cube"
    assert plan_text(episode, machine, CELLS, carried=True) == "PLAN: cube bowl SUBTASK: 2 place bowl"


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_a_sequence_tells_nothing_of_what_is_still_to_be_shown(one, other):
    """Up to the step at which two sequences begin to differ, so do their plans not."""
    same = 8 * next((i for i in range(3) if one[i] != other[i]), 3)
    first, second = (plans("order_3", cues=tuple(cues[:3])) for cues in (one, other))
    assert first[:same] == second[:same]


swaps = st.lists(st.sampled_from([(0, 1), (0, 2), (1, 2)]), min_size=2, max_size=2).map(tuple)


@given(st.integers(0, 2), swaps, swaps)
def test_cups_tell_nothing_of_swaps_to_come(ball, one, other):
    task = TASK["cups"]
    same = next((i for i in range(2) if one[i] != other[i]), 2)
    end = task.swap_start(same) + task.swap_steps if same < 2 else task.locked_steps
    first, second = (plans("cups", cues=(ball,), swaps=drawn) for drawn in (one, other))
    assert first[:end] == second[:end]


@given(st.sampled_from(TASKS), st.integers(0, 2**32 - 1), st.data())
def test_every_plan_is_ecot_and_short(task, seed, data):
    episode = draw_episode(task, seed)
    machine = StateMachine(task, episode.cues, episode.cue_at)
    presses = st.none() | st.integers(0, len(task.objects) - 1)
    cells = [tuple(cell) for cell in np.random.default_rng(seed).integers(0, 16, size=(len(task.objects), 2))]
    for t in range(task.locked_steps + 8):
        text = plan_text(episode, machine, cells)
        assert list(parse(text)) == ["PLAN", "SUBTASK"]
        assert len(tiny_tokenizer()(text)["input_ids"]) <= 16
        machine.advance(data.draw(presses) if t >= task.locked_steps else None, raised=t % 2 == 0)
