"""The order of an epoch's frames: each once, mixed within the buffer, a function of its arguments alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from integrations.starvla_ecot.frames import epoch_visits, frame_order

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
    once = [np.ones(50, np.int64)]
    orders = [epoch_visits(once, seed, epoch, True) for seed in (0, 1) for epoch in (0, 1)]
    assert orders[0] == epoch_visits(once, 0, 0, True)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert all({visit.episode for visit in order} == set(range(50)) for order in orders)


def test_episodes_come_as_often_as_told_and_unshuffled_in_order() -> None:
    visits = epoch_visits([np.array([0, 2, 1]), np.array([1])], 0, 0, False)
    assert [(v.dataset, v.episode, v.copy) for v in visits] == [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 0, 0)]
    assert sorted(map(str, epoch_visits([np.array([0, 2, 1]), np.array([1])], 0, 0, True))) == sorted(
        map(str, visits)
    )
