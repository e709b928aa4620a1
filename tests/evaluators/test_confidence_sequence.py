"""An interval that may be looked at after every episode is right all along, and not much wider than it must be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.intervals import confidence_sequence, wilson_interval


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_it_is_right_at_every_look_at_once(rate: float) -> None:
    rng = np.random.default_rng(int(100 * rate))
    missed = peeked = 0
    for _ in range(150):
        outcomes = (rng.random(150) < rate).astype(float)
        missed += any(not low <= rate <= high for low, high in confidence_sequence(outcomes, 0.9))
        wilson = [wilson_interval(int(k), n, 0.9) for n, k in enumerate(np.cumsum(outcomes), 1)]
        peeked += any(not low <= rate <= high for low, high in wilson)
    assert missed / 150 <= 0.1
    assert peeked / 150 > 0.2, "which an interval for one look is not"


def test_it_uses_that_means_over_tasks_vary_less_than_single_episodes() -> None:
    rng = np.random.default_rng(0)
    blocks = (rng.random((50, 10)) < 0.9).mean(1)
    low, high = confidence_sequence(blocks)[-1]
    assert low < 0.9 < high
    assert high - low < 0.16, "500 episodes; Wilson's for a single look: 0.053"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_intervals_lie_within_each_other(values: list[float]) -> None:
    intervals = confidence_sequence(values)
    assert len(intervals) == len(values)
    for (low, high), (later_low, later_high) in pairwise(intervals):
        if later_low < later_high:
            assert low <= later_low
            assert later_high <= high
    assert all(0 <= low <= high <= 1 for low, high in intervals)


def test_the_future_does_not_change_an_interval() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0]
    assert confidence_sequence(values)[:4] == confidence_sequence(values[:4])


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"value 1 is 1\.5"):
        confidence_sequence([0.5, 1.5])
    with pytest.raises(ValueError, match="confidence 1"):
        confidence_sequence([0.5], 1.0)
