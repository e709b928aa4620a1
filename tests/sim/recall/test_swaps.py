"""Cups change places one pair at a time, smoothly, and never through each other."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ipvla.sim.recall.episode import arcs_are_clear, draw_episode, places, positions_m
from ipvla.sim.recall.scene import SWAP_CLEARANCE_M
from ipvla.sim.recall.tasks import TASKS

CUPS = next(task for task in TASKS if task.name == "cups")
episodes = st.integers(0, 2**32 - 1).map(lambda seed: draw_episode(CUPS, seed))


def path(episode):
    """float64 [steps, objects, 2] over the whole time that the arm is locked, and a little longer."""
    steps = range(CUPS.locked_steps + 3)
    return np.stack([positions_m(CUPS, episode.positions_m, episode.swaps, t) for t in steps])


@given(episodes)
def test_no_two_cups_come_near_each_other(episode):
    paths = path(episode)
    distances = np.linalg.norm(paths[:, :, None] - paths[:, None], axis=-1) + np.eye(3)
    assert distances.min() >= SWAP_CLEARANCE_M - 1e-3


@given(episodes)
def test_cups_move_in_small_steps_and_only_the_pair_that_is_swapped(episode):
    moved = np.linalg.norm(np.diff(path(episode), axis=0), axis=-1)
    assert moved.max() < 0.07
    for i, pair in enumerate(episode.swaps):
        start = CUPS.swap_start(i)
        during = moved[start : start + CUPS.swap_steps]
        assert (during[:, list(pair)] > 0).all()
        assert (np.delete(during, pair, axis=1) == 0).all()
        moved[start : start + CUPS.swap_steps] = 0
    assert (moved == 0).all(), "between the swaps the cups rest"


@given(episodes)
def test_in_the_end_the_same_places_are_taken(episode):
    assert places(CUPS, episode.swaps, 0) == (0, 1, 2)
    last = places(CUPS, episode.swaps, CUPS.locked_steps)
    assert sorted(last) == [0, 1, 2]
    np.testing.assert_array_equal(path(episode)[-1], episode.positions_m[list(last)])


def test_the_lamp_comes_on_only_after_the_last_swap():
    assert CUPS.swap_start(CUPS.swaps - 1) + CUPS.swap_steps < CUPS.locked_steps


def test_a_late_swap_begins_and_ends_when_the_arm_is_free():
    task = next(task for task in TASKS if task.name == "shuffle")
    assert task.shown_steps <= task.locked_steps < task.swap_start(0)
    assert task.swap_start(0) + task.swap_steps < task.horizon


def test_a_hidden_ball_ends_under_each_place_equally_often():
    """Whoever remembers the ball's first place but ignores the swaps is left with chance."""
    stays = 0
    for seed in range(600):
        episode = draw_episode(CUPS, seed)
        (ball,) = episode.cues
        stays += places(CUPS, episode.swaps, CUPS.locked_steps)[ball] == ball
    assert 160 <= stays <= 240, "of 200 expected"


def test_cups_in_a_row_cannot_be_swapped():
    assert not arcs_are_clear(np.array([[0.0, -0.2], [0.0, 0.0], [0.0, 0.2]]))
    assert arcs_are_clear(np.array([[-0.2, -0.2], [0.05, 0.0], [-0.2, 0.2]]))
