"""The order of an epoch's frames: each once, mixed within the buffer, a function of its arguments alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.data.ecot.order import epoch_visits, frame_order

_lengths = st.lists(st.integers(1, 12), max_size=20)


def _order(lengths: list[int], buffer: int, seed: int = 0) -> list[tuple[int, int]]:
    return list(frame_order(lengths, buffer, np.random.default_rng(seed)))


@settings(deadline=None, max_examples=50)
@given(_lengths, st.integers(0, 300))
def test_every_frame_comes_once(lengths: list[int], buffer: int) -> None:
    assert sorted(_order(lengths, buffer)) == [
        (turn, t) for turn, length in enumerate(lengths) for t in range(length)
    ]


@settings(deadline=None, max_examples=50)
@given(_lengths)
def test_without_a_buffer_the_order_stays(lengths: list[int]) -> None:
    assert _order(lengths, 0) == sorted(_order(lengths, 0))


@settings(deadline=None, max_examples=50)
@given(_lengths, st.integers(1, 40))
def test_no_frame_comes_earlier_than_the_buffer_allows(lengths: list[int], buffer: int) -> None:
    place = {frame: i for i, frame in enumerate(_order(lengths, 0))}
    assert all(place[frame] <= i + buffer for i, frame in enumerate(_order(lengths, buffer)))


def test_a_buffer_of_everything_mixes_evenly() -> None:
    first = [_order([3] * 10, 1000, seed)[0][0] for seed in range(3000)]
    assert np.abs(np.bincount(first, minlength=10) / 3000 - 0.1).max() < 0.03


def test_seed_and_epoch_decide_the_order_of_episodes() -> None:
    episodes = [np.arange(50)]
    orders = [epoch_visits(episodes, [1.0], seed, epoch, True) for seed in (0, 1) for epoch in (0, 1)]
    assert orders[0] == epoch_visits(episodes, [1.0], 0, 0, True)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert all({visit.episode for visit in order} == set(range(50)) for order in orders)


@pytest.mark.parametrize("weight", [0.3, 1.0, 1.7, 2.0])
def test_a_weight_is_how_often_an_episode_comes_in_the_mean(weight: float) -> None:
    times = np.zeros(200)
    for epoch in range(50):
        visits = epoch_visits([np.arange(200)], [weight], 0, epoch, True)
        assert len({(visit.episode, visit.copy) for visit in visits}) == len(visits)
        np.add.at(times, [visit.episode for visit in visits], 1)
    assert abs(times.mean() / 50 - weight) < 0.05
    assert times.min() / 50 >= np.floor(weight)
    assert times.max() / 50 <= np.ceil(weight)


def test_only_the_given_episodes_are_visited_and_unshuffled_in_order() -> None:
    visits = epoch_visits([np.array([1, 4]), np.array([0])], [1.0, 1.0], 0, 0, False)
    assert [(visit.dataset, visit.episode) for visit in visits] == [(0, 1), (0, 4), (1, 0)]
