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


def a_machine(name, *cues):
    return StateMachine(TASK[name], cues)


def press(machine, buttons):
    return play(machine, [step for button in buttons for step in ((button, False, False), LIFT)])


any_machine = st.sampled_from(
    [
        ("ground_red",),
        ("recall", 1),
        ("count_red2_blue1",),
        ("count_red1_blue1",),
        ("place",),
        ("items_2", 1, 0),
        ("items_3", 0, 1, 3),
        ("order_2", 1, 0),
        ("cups", 0),
        ("glimpse", 2),
    ]
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
        assert copy.todo == machine.todo


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
    assert press(a_machine("count_red2_blue1"), presses).failure


@given(st.integers(0, 2), st.integers(0, 2))
def test_recall_is_won_by_the_button_that_lit_up_alone(cue, pressed):
    machine = play(a_machine("recall", cue), [LIFT] * 15 + [(pressed, False, False)])
    assert machine.success == (pressed == cue)
    assert machine.failure == (pressed != cue)


@given(st.integers(1, 30), st.integers(0, 200))
def test_cue_then_delay_then_freedom(cue_steps, delay_steps):
    task = replace(TASK["recall"], cue_steps=cue_steps, delay_steps=delay_steps)
    machine = StateMachine(task, (2,))
    for t in range(cue_steps + delay_steps + 5):
        assert machine.lit == ((2,) if t < cue_steps else ())
        assert machine.locked == (t < cue_steps + delay_steps)
        play(machine, [LIFT])


@pytest.mark.parametrize("name", ["items_2", "items_3"])
def test_items_light_up_together(name):
    cues = tuple(range(TASK[name].items))
    machine = a_machine(name, *cues)
    for t in range(30):
        assert machine.lit == (cues if t < 5 else ())
        assert machine.locked == (t < 15)
        play(machine, [LIFT])


def test_a_sequence_lights_up_one_by_one_with_dark_steps_between():
    machine = a_machine("order_3", 2, 0, 3)
    lit, shown, locked = [], [], []
    for _ in range(40):
        lit.append(machine.lit)
        shown.append(machine.shown)
        locked.append(machine.locked)
        play(machine, [LIFT])
    dark = [()] * 3
    assert lit == [(2,)] * 5 + dark + [(0,)] * 5 + dark + [(3,)] * 5 + [()] * 19
    assert shown == [(2,)] * 8 + [(2, 0)] * 8 + [(2, 0, 3)] * 24
    assert locked == [True] * 31 + [False] * 9


@given(st.permutations(range(5)).map(lambda order: order[:3]), st.permutations(range(3)))
def test_items_are_won_in_any_order(cues, order):
    machine = a_machine("items_3", *cues)
    for done, index in enumerate(order):
        assert not machine.success
        assert machine.progress == done
        assert set(machine.todo) == set(cues) - set(machine.pressed)
        press(machine, [cues[index]])
    assert machine.success
    assert machine.todo == ()


@pytest.mark.parametrize("presses", [[0, 0], [4], [0, 1, 4], [2, 2, 1, 0]])
def test_items_are_lost_by_another_button_or_by_one_twice(presses):
    machine = press(a_machine("items_3", 0, 1, 2), presses)
    assert machine.failure
    assert machine.todo == ()


@given(st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_an_order_is_won_in_its_own_order_alone(presses):
    machine = press(a_machine("order_2", 3, 1), presses)
    assert machine.success == (presses == [3, 1])
    assert machine.failure == (presses != [3, 1])


def test_a_press_is_acknowledged_for_as_long_as_the_task_says():
    flash = TASK["count_red2_blue1"].flash_steps
    assert flash == 8
    machine = play(a_machine("count_red2_blue1"), [LIFT, (0, False, False)])
    shown = []
    for _ in range(flash + 4):
        shown.append(machine.flashing)
        play(machine, [LIFT])
    assert shown == [0] * flash + [None] * 4


def test_a_glimpse_is_shown_for_a_moment_while_the_arm_is_free():
    machine = StateMachine(TASK["glimpse"], (2,), cue_at=20)
    for t in range(60):
        assert machine.lit == ((2,) if 20 <= t < 28 else ())
        assert machine.shown == ((2,) if t >= 20 else ())
        assert machine.locked == (t < 5)
        play(machine, [LIFT])


@pytest.mark.parametrize(("late", "won"), [(45, True), (46, False)])
def test_a_glimpse_is_lost_by_waiting(late, won):
    machine = play(StateMachine(TASK["glimpse"], (2,), cue_at=20), [LIFT] * (19 + late))
    assert not machine.failure
    play(machine, [(2, False, False), *[LIFT] * 10])
    assert (machine.success, machine.failure) == (won, not won)


def test_place_is_won_by_delivery():
    machine = play(a_machine("place"), [LIFT] * 3)
    assert not machine.success
    assert play(machine, [(None, True, True)]).success
    assert not machine.failure
