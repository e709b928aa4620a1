"""What an epoch plan promises, for any episodes, lanes, window and stride."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.data.plan import EpochPlan, PlanPosition, WindowPlan

_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=25).map(lambda x: np.array(x, np.int64))
_small = st.integers(1, 6)


@st.composite
def _plans(draw: st.DrawFn) -> tuple[np.ndarray, int, EpochPlan]:
    """(lengths, stride, plan)"""
    lengths, stride = draw(_lengths), draw(_small)
    seed, epoch = draw(st.integers(0, 2**40)), draw(st.integers(0, 50))
    plan = EpochPlan(lengths, seed, epoch, lanes_total=draw(_small), window=draw(_small), stride=stride)
    return lengths, stride, plan


def _streams(plan: EpochPlan) -> WindowPlan:
    """All windows of each lane in a row: [lanes, num_windows * K]."""
    windows = [plan.window(w) for w in range(plan.num_windows)]
    return WindowPlan(
        *(np.concatenate([getattr(w, name) for w in windows], axis=1) for name in ("episode", "t", "is_first"))
    )


def _steps(plan: EpochPlan) -> list[tuple[int, int]]:
    streams = _streams(plan)
    active = streams.episode >= 0
    return list(zip(streams.episode[active].tolist(), streams.t[active].tolist(), strict=True))


def _visits(plan: EpochPlan) -> Iterator[tuple[int, list[int], list[bool]]]:
    """(episode, its control steps, its is_first) for every run of one episode on a lane."""
    streams = _streams(plan)
    for lane in zip(streams.episode.tolist(), streams.t.tolist(), streams.is_first.tolist(), strict=True):
        for episode, run in itertools.groupby(zip(*lane, strict=True), key=lambda step: step[0]):
            _, t, first = zip(*run, strict=True)
            if episode >= 0:
                yield episode, list(t), list(first)


@given(_plans())
def test_every_episode_is_walked_once_whole_and_in_order(case: tuple[np.ndarray, int, EpochPlan]) -> None:
    lengths, stride, plan = case
    visits = list(_visits(plan))
    assert sorted(episode for episode, _, _ in visits) == list(range(len(lengths)))
    for episode, t, first in visits:
        assert 0 <= t[0] < stride
        assert t == list(range(t[0], lengths[episode], stride))
        assert first == [True] + [False] * (len(t) - 1)


@given(_plans())
def test_lanes_idle_only_at_their_end(case: tuple[np.ndarray, int, EpochPlan]) -> None:
    _, _, plan = case
    streams = _streams(plan)
    active = streams.episode >= 0
    assert (np.diff(active.astype(int), axis=1) <= 0).all()
    assert not streams.t[~active].any()
    assert not streams.is_first[~active].any()
    assert plan.idle_share == pytest.approx(1 - active.mean())
    assert active[:, -plan.window(0).t.shape[1] :].any(), "a last window without any step"


@given(_lengths, _small, st.integers(0, 9))
def test_worlds_of_any_size_cover_the_same_steps(lengths: np.ndarray, stride: int, epoch: int) -> None:
    shapes = [(1, 3), (4, 3), (2, 8)]
    covered = [
        sorted(_steps(EpochPlan(lengths, 7, epoch, lanes_total=lanes, window=window, stride=stride)))
        for lanes, window in shapes
    ]
    assert covered[0] == covered[1] == covered[2]


@given(_lengths)
def test_stride_one_covers_every_transition_once(lengths: np.ndarray) -> None:
    plan = EpochPlan(lengths, 0, 0, lanes_total=3, window=4, stride=1)
    assert sorted(_steps(plan)) == [(e, t) for e, length in enumerate(lengths) for t in range(length)]


@given(_lengths, _small)
def test_the_plan_is_a_pure_function_of_its_arguments(lengths: np.ndarray, stride: int) -> None:
    def streams(seed: int, epoch: int) -> list[list[list[int]]]:
        plan = _streams(EpochPlan(lengths, seed, epoch, lanes_total=2, window=3, stride=stride))
        return [plan.episode.tolist(), plan.t.tolist(), plan.is_first.tolist()]

    assert streams(3, 5) == streams(3, 5)


def test_epochs_and_seeds_differ() -> None:
    lengths = np.full(50, 20, np.int64)
    plans = [
        _steps(EpochPlan(lengths, seed, epoch, lanes_total=2, window=4, stride=4))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_over_the_epochs_every_control_step_is_seen() -> None:
    lengths = np.array([9, 13, 2, 30], np.int64)
    plans = (EpochPlan(lengths, 0, epoch, lanes_total=2, window=4, stride=4) for epoch in range(60))
    seen = {step for plan in plans for step in _steps(plan)}
    assert seen == {(e, t) for e, length in enumerate(lengths) for t in range(length)}


@given(_lengths, _small, st.data())
def test_episodes_begin_within_the_offsets(lengths: np.ndarray, stride: int, data: st.DataObject) -> None:
    offsets = data.draw(st.integers(1, stride))
    plan = EpochPlan(lengths, 0, 0, lanes_total=2, window=4, stride=stride, offsets=offsets)
    for episode, t, _ in _visits(plan):
        assert 0 <= t[0] < offsets
        assert t == list(range(t[0], lengths[episode], stride))


def test_little_is_idle_and_planning_is_fast() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 76_000)
    start = time.process_time()
    plan = EpochPlan(lengths, 0, 0, lanes_total=256, window=16, stride=4)
    assert time.process_time() - start < 1.0
    assert plan.idle_share < 0.01


def test_long_episodes_do_not_leave_the_other_lanes_idle() -> None:
    lengths = np.array([20] * 80 + [400], np.int64)
    for epoch in range(5):
        assert EpochPlan(lengths, 0, epoch, lanes_total=4, window=10, stride=1).idle_share == 0


def test_a_window_outside_the_epoch_is_refused() -> None:
    plan = EpochPlan(np.array([8], np.int64), 0, 0, lanes_total=1, window=4, stride=1)
    with pytest.raises(ValueError, match="window 2 is outside this epoch's 2"):
        plan.window(2)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_no_episodes_or_empty_ones_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        EpochPlan(np.array(lengths, np.int64), 0, 0, lanes_total=1, window=1, stride=1)


def test_positions_run_into_the_next_epoch() -> None:
    position = PlanPosition()
    seen = []
    for num_windows in (2, 2, 3, 3, 3):
        seen.append((position.epoch, position.window))
        position = position.next(num_windows)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert position == PlanPosition(2, 0)


@st.composite
def _replanned(draw: st.DrawFn) -> tuple[np.ndarray, int, list[tuple[EpochPlan, int, int]]]:
    """(lengths, stride, parts of one epoch: plan, its lanes, windows of it that are played)"""
    lengths, stride, window = draw(_lengths), draw(_small), draw(_small)
    position, played = PlanPosition(), []
    while position.epoch == 0:
        lanes = draw(st.integers(1, 8)) * draw(st.integers(1, 3))
        plan = EpochPlan(lengths, 5, 0, lanes_total=lanes, window=window, stride=stride, before=position.before)
        windows = draw(st.integers(1, plan.num_windows)) if len(played) < 4 else plan.num_windows
        for _ in range(windows):
            position = position.next(plan.num_windows)
        played.append((plan, lanes, windows))
        position = position.on_other_lanes(lanes) if position.epoch == 0 else position
    return lengths, stride, played


@given(_replanned())
def test_with_other_lanes_midway_every_sampled_step_still_comes_once(
    case: tuple[np.ndarray, int, list[tuple[EpochPlan, int, int]]],
) -> None:
    lengths, stride, played = case
    seen: list[tuple[int, int]] = []
    for plan, _, windows in played:
        for window in map(plan.window, range(windows)):
            active = window.episode >= 0
            seen += zip(window.episode[active].tolist(), window.t[active].tolist(), strict=True)
    assert sorted(seen) == sorted(_steps(EpochPlan(lengths, 5, 0, lanes_total=1, window=1, stride=stride)))


@given(_replanned())
def test_an_episode_under_way_goes_on_where_its_memory_is_or_begins_afresh(
    case: tuple[np.ndarray, int, list[tuple[EpochPlan, int, int]]],
) -> None:
    _, _, played = case
    memory: dict[int, tuple[int, int]] = {}  # lane -> the episode and step that its memory is of
    restarted = 0
    for plan, lanes, windows in played:
        started = {episode for episode, _ in memory.values()}
        memory = {lane: held for lane, held in memory.items() if lane < lanes}
        carried = {episode for episode, _ in memory.values()}
        places = [
            (lane, *place)
            for window in map(plan.window, range(windows))
            for lane in range(lanes)
            for place in zip(window.episode[lane], window.t[lane], window.is_first[lane], strict=True)
        ]
        for lane, episode, t, first in places:
            if episode < 0:
                continue
            if not first:
                assert memory[lane][0] == episode
                assert memory[lane][1] < t
            else:
                assert episode not in carried
                restarted += episode in started
            memory[lane] = (int(episode), int(t))
    assert restarted <= sum(plan.restarted for plan, _, _ in played)


def test_a_position_is_written_and_read_back() -> None:
    position = PlanPosition(3, 7).on_other_lanes(16).next(9).on_other_lanes(4)
    assert PlanPosition.from_dict(json.loads(json.dumps(asdict(position)))) == position
    assert PlanPosition.from_dict({"epoch": 1, "window": 2}) == PlanPosition(1, 2)


def test_before_the_first_window_of_an_epoch_any_number_of_lanes_is_as_good() -> None:
    assert PlanPosition(4).on_other_lanes(8) == PlanPosition(4)


@given(_lengths, st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_steps_lie_on_the_grid_of_new_pictures(lengths: np.ndarray, grid: int, times: int, seed: int) -> None:
    plan = EpochPlan(lengths, seed, 0, lanes_total=2, window=3, stride=grid * times, grid=grid)
    steps = _steps(plan)
    assert {episode for episode, _ in steps} == set(range(len(lengths)))
    assert all(t % grid == 0 for _, t in steps)
