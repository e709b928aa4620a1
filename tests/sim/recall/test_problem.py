"""What the state machine decides is what the camera shows and the arm obeys, in the very next frame."""

import mujoco
import numpy as np
import pytest

pytestmark = pytest.mark.slow

STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])
FORWARD = np.array([1.0, 0, 0, 0, 0, 0, 1.0])


def yellow_pixels(picture):
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int(((red > 150) & (green > 150) & (blue < 100)).sum())


def red_pixels(picture):
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int(((red > 80) & (green < red / 2) & (blue < 0.8 * red)).sum())


def cyan_pixels(picture):
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int(((red < 80) & (green > 120) & (blue > 120)).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cue_shows_on_the_first_frames_and_never_again(simulator_of, seed):
    simulator = simulator_of("recall")
    simulator.reset(seed)
    lit, lamp = [], []
    for _ in range(20):
        picture = simulator.observe().images["agentview"]
        lit.append(yellow_pixels(picture) > 10)
        lamp.append(cyan_pixels(picture) > 10)
        simulator.step(STILL)
    assert lit == [True] * 5 + [False] * 15
    assert lamp == [False] * 15 + [True] * 5


def test_without_the_cue_nothing_tells_the_buttons_apart(simulator_of):
    """The same layout with another cue looks the same once the cue is over: the policy has to remember."""
    simulator = simulator_of("recall")
    pictures = []
    for cue in range(3):
        simulator.reset(0)
        simulator.problem.machine.cues = (cue,)
        for _ in range(15):
            simulator.step(STILL)
        pictures.append(simulator.frame(64))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def test_the_arm_is_locked_until_the_lamp(simulator_of):
    simulator = simulator_of("recall")
    simulator.reset(0)
    start = simulator.observe().proprio[:3]
    for _ in range(15):
        simulator.step(FORWARD)
    np.testing.assert_allclose(simulator.observe().proprio[:3], start, atol=1e-3)
    for _ in range(10):
        simulator.step(FORWARD)
    assert simulator.observe().proprio[0] > start[0] + 0.02


@pytest.mark.parametrize("task", ["recall", "cups", "order_3"])
def test_a_locked_step_costs_no_physics(simulator_of, monkeypatch, task):
    simulator = simulator_of(task)
    simulator.reset(3)
    physics = []
    mj_step = mujoco.mj_step
    monkeypatch.setattr(mujoco, "mj_step", lambda *args: (physics.append(1), mj_step(*args)))
    start = simulator.observe().proprio
    for t in range(simulator.task.locked_steps):
        assert simulator.observe().t == t
        simulator.step(FORWARD)
    assert physics == []
    np.testing.assert_array_equal(simulator.observe().proprio, start)
    simulator.step(FORWARD)
    assert len(physics) > 0


def test_the_first_free_step_finds_the_arm_at_rest_however_long_the_delay(simulator_of):
    moved = []
    for task in ("ground_red", "recall", "recall_delay_35"):
        simulator = simulator_of(task)
        simulator.reset(0)
        for _ in range(simulator.task.locked_steps):
            simulator.step(FORWARD)
        start = simulator.observe().proprio
        for _ in range(3):
            simulator.step(FORWARD)
        moved.append(simulator.observe().proprio - start)
    np.testing.assert_allclose(moved[1], moved[0], atol=1e-6)
    np.testing.assert_allclose(moved[2], moved[0], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ball_shows_on_the_first_frames_and_never_again(simulator_of, seed):
    simulator = simulator_of("cups")
    simulator.reset(seed)
    seen = []
    for _ in range(simulator.task.locked_steps + 5):
        seen.append(red_pixels(simulator.observe().images["agentview"]))
        simulator.step(STILL)
    assert min(seen[:5]) >= 4
    assert max(seen[5:]) == 0


def test_once_covered_nothing_tells_the_cups_apart(simulator_of):
    simulator = simulator_of("cups")
    pictures = []
    for ball in range(3):
        simulator.reset(0)
        simulator.problem.machine.cues = (ball,)
        shown = []
        for _ in range(simulator.task.locked_steps):
            shown.append(simulator.frame(64))
            simulator.step(STILL)
        pictures.append(np.stack(shown))
    assert not np.array_equal(pictures[0][:5], pictures[1][:5])
    np.testing.assert_array_equal(pictures[0][5:], pictures[1][5:])
    np.testing.assert_array_equal(pictures[0][5:], pictures[2][5:])


def test_cups_are_where_the_swaps_take_them_and_stay_there(simulator_of):
    simulator = simulator_of("cups")
    problem = simulator.problem
    for seed in range(3):
        simulator.reset(seed)
        for _ in range(simulator.task.locked_steps):
            simulator.step(STILL)
            cups = np.stack([problem.position_m(i)[:2] for i in range(3)])
            np.testing.assert_allclose(cups, problem.positions_planned_m(), atol=1e-9)
        assert sorted(problem.episode.positions_m.tolist()) == sorted(problem.positions_planned_m().tolist())
        for _ in range(5):
            simulator.step(STILL)
        rested = np.stack([problem.position_m(i)[:2] for i in range(3)])
        np.testing.assert_allclose(rested, cups, atol=1e-4)


@pytest.mark.parametrize(("task", "moving"), [("chase", range(1, 80)), ("shuffle", range(21, 36))])
def test_things_move_while_the_arm_is_free(simulator_of, task, moving):
    simulator = simulator_of(task)
    problem = simulator.problem
    simulator.reset(3)
    places = []
    for _ in range(simulator.task.horizon):
        simulator.step(STILL)
        places.append(np.stack([problem.position_m(i)[:2] for i in range(len(problem.task.objects))]))
        np.testing.assert_allclose(places[-1], problem.positions_planned_m(), atol=2e-3)
    moved_m = np.linalg.norm(np.diff(places, axis=0), axis=-1).max(1)
    went = [t for t, far in enumerate(moved_m, 2) if far > 2e-3]
    assert simulator.task.locked_steps < went[-1]
    assert set(went) <= set(range(moving[0], moving[-1] + 2))


def test_a_late_cue_shows_when_it_is_due_and_never_again(simulator_of):
    simulator = simulator_of("glimpse")
    simulator.reset(1)
    at, lit = simulator.problem.episode.cue_at, []
    for _ in range(simulator.task.horizon):
        lit.append(yellow_pixels(simulator.observe().images["agentview"]) > 10)
        simulator.step(STILL)
    assert [t for t, shown in enumerate(lit) if shown] == list(range(at, at + simulator.task.cue_steps))


def test_items_and_sequences_show_in_the_picture(simulator_of):
    for task, lit in {"items_3": [True] * 5 + [False] * 15, "order_3": [*[True] * 5, *[False] * 3] * 3}.items():
        simulator = simulator_of(task)
        simulator.reset(0)
        shown = []
        for _ in lit:
            shown.append(yellow_pixels(simulator.observe().images["agentview"]) > 10)
            simulator.step(STILL)
        assert shown == lit


def test_instruction_and_details_tell_the_episode(simulator_of):
    simulator = simulator_of("recall")
    instructions = set()
    for seed in range(12):
        simulator.reset(seed)
        instructions.add(simulator.observe().instruction)
        assert set(simulator.details()["cues"]) < set(simulator.task.names)
        assert simulator.details()["pressed"] == []
    assert len(instructions) > 1
    assert instructions <= set(simulator.task.phrasings)
