"""Who wins a Recall episode is decided without physics."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.sim.recall.state_machine import StateMachine
from ipvla.sim.recall.tasks import TASKS

TASK = {task.name: task for task in TASKS}
LIFT = (None, True, False)


def senses(buttons=3):
    touched = st.one_of(st.none(), st.integers(0, buttons - 1))
    return st.lists(st.tuples(touched, st.booleans(), st.booleans()), max_size=80)


def play(machine, steps):
    for touched, raised, delivered in steps:
        machine.advance(touched, raised, delivered)
    return machine


def a_machine(name, cue=None):
    return StateMachine(TASK[name], cue=cue)


any_machine = st.sampled_from(
    [("ground_red", None), ("recall", 1), ("count_red2_blue1", None), ("count_red1_blue1", None), ("place", None)]
)


@given(any_machine, senses(2))
def test_success_and_failure_exclude_each_other_and_are_final(which, steps):
    machine = a_machine(*which)
    decided = None
    for step in steps:
        play(machine, [step])
        assert not (machine.success and machine.failure)
        if decided is not None:
            assert (machine.success, machine.failure, list(machine.pressed)) == decided
        if machine.success or machine.failure:
            decided = (machine.success, machine.failure, list(machine.pressed))


@given(any_machine, senses(2))
def test_time_counts_every_step(which, steps):
    assert play(a_machine(*which), steps).t == len(steps)


@given(any_machine, senses(2), senses(2))
def test_a_saved_machine_has_the_same_future(which, before, after):
    machine = play(a_machine(*which), before)
    copy = a_machine(*which)
    copy.load_array(machine.to_array())
    for step in after:
        play(machine, [step])
        play(copy, [step])
        assert copy == machine
        assert (copy.lit, copy.flashing, copy.locked) == (machine.lit, machine.flashing, machine.locked)


@given(st.integers(1, 20))
def test_a_resting_finger_presses_once(steps):
    machine = play(a_machine("count_red2_blue1"), [(0, False, False)] * steps)
    assert machine.pressed == [0]


def test_the_next_press_counts_only_after_the_hand_was_raised():
    machine = play(a_machine("count_red2_blue1"), [(0, False, False), (None, False, False), (0, False, False)])
    assert machine.progress == 1
    play(machine, [LIFT, (0, False, False)])
    assert machine.progress == 2


@pytest.mark.parametrize("name", ["ground_green", "count_red2_blue1", "count_red1_blue1"])
def test_the_program_succeeds_and_nothing_shorter(name):
    machine = a_machine(name)
    for button in TASK[name].program:
        assert not machine.success
        play(machine, [(button, False, False), LIFT])
    assert machine.success


@pytest.mark.parametrize("presses", [[1], [0, 1], [0, 0, 0]])
def test_counting_wrong_fails(presses):
    machine = a_machine("count_red2_blue1")
    for button in presses:
        play(machine, [(button, False, False), LIFT])
    assert machine.failure


@given(st.integers(0, 2), st.integers(0, 2))
def test_recall_is_won_by_the_button_that_lit_up_alone(cue, pressed):
    machine = play(a_machine("recall", cue), [LIFT] * 15 + [(pressed, False, False)])
    assert machine.success == (pressed == cue)
    assert machine.failure == (pressed != cue)


@given(st.integers(1, 30), st.integers(0, 200))
def test_cue_then_delay_then_freedom(cue_steps, delay_steps):
    task = replace(TASK["recall"], cue_steps=cue_steps, delay_steps=delay_steps)
    machine = StateMachine(task, cue=2)
    for t in range(cue_steps + delay_steps + 5):
        assert machine.lit == (2 if t < cue_steps else None)
        assert machine.locked == (t < cue_steps + delay_steps)
        play(machine, [LIFT])


def test_a_press_is_acknowledged_for_as_long_as_the_task_says():
    flash = TASK["count_red2_blue1"].flash_steps
    assert flash == 8
    machine = play(a_machine("count_red2_blue1"), [LIFT, (0, False, False)])
    shown = []
    for _ in range(flash + 4):
        shown.append(machine.flashing)
        play(machine, [LIFT])
    assert shown == [0] * flash + [None] * 4


def test_place_is_won_by_delivery():
    machine = play(a_machine("place"), [LIFT] * 3)
    assert not machine.success
    assert play(machine, [(None, True, True)]).success
    assert not machine.failure
