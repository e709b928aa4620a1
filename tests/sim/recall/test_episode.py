"""Everything random in an episode comes from its seed and from nothing else."""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.sim.recall.episode import draw_episode, planned_m
from ipvla.sim.recall.scene import BUTTON_RADIUS_M, MIN_DISTANCE_M, WORKSPACE_X_M, WORKSPACE_Y_M
from ipvla.sim.recall.tasks import TASKS

TASK = {task.name: task for task in TASKS}

seeds = st.integers(0, 2**32 - 1)
tasks = st.sampled_from(TASKS)


@given(tasks, seeds)
def test_a_seed_gives_one_episode_whatever_the_global_generator_did(task, seed):
    first = draw_episode(task, seed)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    second = draw_episode(task, seed)
    assert (np.random.get_state()[1] == before).all()
    assert (first.instruction, first.cues, first.swaps) == (second.instruction, second.cues, second.swaps)
    np.testing.assert_array_equal(first.positions_m, second.positions_m)


@given(tasks, seeds)
def test_objects_lie_in_reach_and_apart(task, seed):
    positions = draw_episode(task, seed).positions_m
    assert positions.shape == (len(task.objects), 2)
    assert (positions >= [WORKSPACE_X_M[0], WORKSPACE_Y_M[0]]).all()
    assert (positions <= [WORKSPACE_X_M[1], WORKSPACE_Y_M[1]]).all()
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1) + np.eye(len(positions))
    assert distances.min() >= MIN_DISTANCE_M


@settings(max_examples=3)
@given(st.integers(0, 2**31))
def test_every_cue_and_every_phrasing_comes_up(start):
    for task in TASKS:
        drawn = [draw_episode(task, seed) for seed in range(start, start + 60)]
        assert {episode.instruction for episode in drawn} == set(task.phrasings)
        assert {len(episode.cues) for episode in drawn} == {task.items}
        cues = {cue for episode in drawn for cue in episode.cues}
        assert cues == (set(range(len(task.objects))) if task.items else set())


@given(tasks, seeds)
def test_no_object_is_a_cue_twice(task, seed):
    cues = draw_episode(task, seed).cues
    assert len(set(cues)) == len(cues)


@given(st.sampled_from([TASK["items_2"], TASK["items_3"]]), seeds)
def test_cues_without_an_order_are_listed_from_left_to_right(task, seed):
    episode = draw_episode(task, seed)
    across = episode.positions_m[list(episode.cues), 1]
    assert (np.diff(across) > 0).all()


def test_every_order_of_cues_and_every_pair_of_cups_comes_up_equally_often():
    episodes = [draw_episode(TASK["order_2"], seed) for seed in range(1200)]
    counts = Counter(episode.cues for episode in episodes)
    assert set(counts) == set(permutations(range(4), 2))
    assert min(counts.values()) > 60, "of 100 expected"
    swaps = Counter(tuple(sorted(pair)) for seed in range(300) for pair in draw_episode(TASK["cups"], seed).swaps)
    assert set(swaps) == set(combinations(range(3), 2))
    assert min(swaps.values()) > 150, "of 200 expected"


@given(seeds)
def test_a_button_roams_steadily_within_reach_and_clear_of_the_others(seed):
    task = TASK["chase"]
    episode = draw_episode(task, seed)
    positions = np.stack([planned_m(task, episode, t) for t in range(task.horizon + 1)])
    np.testing.assert_array_equal(positions[0], episode.positions_m)
    assert (positions[:, 1] == episode.positions_m[1]).all(), "the green one stands"
    np.testing.assert_allclose(np.linalg.norm(np.diff(positions[:, 0], axis=0), axis=-1), task.roaming_step_m)
    low, high = np.transpose([WORKSPACE_X_M, WORKSPACE_Y_M])
    assert (positions >= low - 1e-9).all()
    assert (positions <= high + 1e-9).all()
    assert np.linalg.norm(positions[:, 0] - positions[:, 1], axis=-1).min() >= MIN_DISTANCE_M - 1e-9


def test_after_half_a_second_it_is_seldom_where_it_was():
    task = TASK["chase"]
    gone = [np.linalg.norm(draw_episode(task, seed).roamed_m[10, 0]) for seed in range(100)]
    assert np.median(gone) > BUTTON_RADIUS_M


@given(seeds)
def test_a_glimpse_comes_once_the_arm_is_free_and_may_be_answered_before_the_horizon(seed):
    task = TASK["glimpse"]
    at = draw_episode(task, seed).cue_at
    assert task.locked_steps <= task.cue_from[0] <= at <= task.cue_from[1]
    assert at + task.deadline_steps < task.horizon


def test_a_glimpse_comes_at_any_time():
    first, last = TASK["glimpse"].cue_from
    drawn = {draw_episode(TASK["glimpse"], seed).cue_at for seed in range(600)}
    assert drawn == set(range(first, last + 1))


def test_tasks_do_not_share_layouts():
    first, second = (draw_episode(task, 0).positions_m for task in TASKS[:2])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"outside \[0, 2\^32\); take it from Split"):
        draw_episode(TASKS[0], seed)
