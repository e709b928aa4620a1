import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evaluators.pareto import Outcomes, area, front, gap, retention_at

levels = st.integers(0, 8).map(lambda k: k / 8)
point_sets = st.integers(1, 9).flatmap(lambda n: npst.arrays(np.float64, (n, 2), elements=levels))
quick = settings(max_examples=60, deadline=None)


def outcomes(new, old, seeds=5, scenes=200, seed=0):
    """Coin flips whose rates at point p are new[p] and old[p]; a scene is as hard for every method."""
    ease = np.random.default_rng(99).normal(0, 0.2, scenes)
    rng = np.random.default_rng(seed)

    def play(rates):
        p = np.clip(np.asarray(rates)[None, :, None] + ease, 0, 1)
        return (rng.random((seeds, len(rates), scenes)) < p).astype(float)

    return Outcomes(play(new), play(old))


def alone(statistic, method, draws):
    """Against a method that can do nothing."""
    return gap(statistic, method, Outcomes(0 * method.new, 0 * method.old), draws)


@given(point_sets)
@quick
def test_the_front_is_what_nothing_else_dominates(points):
    def dominated(p):
        return any((q >= p).all() and (q > p).any() for q in points)

    assert {tuple(p) for p in front(points)} == {tuple(p) for p in points if not dominated(p)}
    assert (np.diff(front(points)[:, 0]) > 0).all()
    assert (np.diff(front(points)[:, 1]) < 0).all()


@given(point_sets)
@quick
def test_the_area_is_the_share_of_the_square_with_a_better_point(points):
    x, y = np.meshgrid((np.arange(8) + 0.5) / 8, (np.arange(8) + 0.5) / 8)
    covered = ((points[:, 0, None, None] > x) & (points[:, 1, None, None] > y)).any(0)
    assert area(points) == pytest.approx(covered.mean())


@given(point_sets, st.tuples(levels, levels))
@quick
def test_another_point_never_shrinks_the_area_and_a_dominated_one_changes_nothing(points, extra):
    more = np.concatenate([points, [extra]])
    assert area(more) >= area(points)
    assert area(np.concatenate([points, [points[0] / 2]])) == pytest.approx(area(points))


def test_what_lies_beyond_the_unit_square_counts_as_on_its_edge():
    points = np.array([[0.5, 0.9], [0.9, 0.5]])
    assert area(points) == pytest.approx(0.5 * 0.9 + 0.4 * 0.5)
    assert area(np.array([[0.5, 1.4], [-1.0, 2.0]])) == pytest.approx(0.5)


def test_retention_at_equal_success_lies_on_the_line_between_neighbours():
    points = np.array([[0.4, 0.9], [0.8, 0.5], [0.5, 0.1]])
    assert retention_at(points, 0.5) == pytest.approx(0.8)
    assert retention_at(points, 0.8) == pytest.approx(0.5)
    assert retention_at(points, 0.1) == pytest.approx(0.9)
    assert math.isnan(retention_at(points, 0.81))


@given(point_sets, st.tuples(levels, levels))
@quick
def test_retention_falls_along_the_front(points, where):
    low, high = np.nan_to_num([retention_at(points, new) for new in sorted(where)], nan=-1.0)
    assert low >= high


def test_a_method_and_itself_differ_by_nothing_in_every_draw():
    one = outcomes([0.3, 0.6, 0.8], [0.9, 0.7, 0.3])
    difference = gap(area, one, one, draws=50)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_a_gap_is_told_apart_by_its_interval_and_turns_its_sign_with_the_methods():
    better, worse = outcomes([0.3, 0.7], [0.9, 0.7]), outcomes([0.3, 0.7], [0.8, 0.5], seed=1)
    ahead, behind = gap(area, better, worse, draws=400), gap(area, worse, better, draws=400)
    assert ahead.value == pytest.approx(area(better.points) - area(worse.points))
    assert 0 < ahead.low < ahead.value < ahead.high
    assert behind.value == pytest.approx(-ahead.value)
    assert (behind.low, behind.high) == pytest.approx((-ahead.high, -ahead.low))
    at_half = gap(partial(retention_at, new=0.5), better, worse, draws=400)
    assert 0 < at_half.low < at_half.value < at_half.high


def test_scenes_that_both_played_narrow_the_gap():
    """Difficulty that the scenes share cancels in the gap and not in the areas."""
    hard = np.random.default_rng(0).random((5, 1, 60))
    first = Outcomes(np.full((5, 1, 60), 0.8), np.broadcast_to(hard[:1], (5, 1, 60)))
    second = Outcomes(first.new, np.broadcast_to(hard[:1] * 0.9, (5, 1, 60)))
    one, difference = alone(area, first, draws=300), gap(area, first, second, draws=300)
    assert difference.high - difference.low < 0.2 * (one.high - one.low)


def test_seeds_that_differ_widen_the_interval():
    rates = np.linspace(-0.2, 0.2, 5)[:, None, None]
    alike = Outcomes(np.full((5, 1, 4), 0.8), np.full((5, 1, 4), 0.6))
    differing = Outcomes(alike.new, alike.old + rates)
    narrow, wide = alone(area, alike, draws=200), alone(area, differing, draws=200)
    assert narrow.value == pytest.approx(wide.value)
    assert narrow.high - narrow.low == pytest.approx(0, abs=1e-9)
    assert wide.high - wide.low > 0.1


def test_the_same_seed_draws_the_same_interval_and_one_training_seed_has_none():
    many, one = outcomes([0.5], [0.5], scenes=30), outcomes([0.5], [0.5], seeds=1, scenes=30)
    assert alone(area, many, draws=50) == alone(area, many, draws=50)
    assert math.isnan(alone(area, one, draws=50).low)


def test_what_cannot_be_compared_is_refused():
    first = outcomes([0.5], [0.5])
    with pytest.raises(ValueError, match="compare them on the same seeds and scenes"):
        gap(area, first, outcomes([0.5], [0.5], scenes=199))
    with pytest.raises(ValueError, match=r"undefined in \d+ of 50 draws; compare at a new-task success that"):
        gap(partial(retention_at, new=0.5), first, first, draws=50)
    with pytest.raises(ValueError, match="with the same seeds and points"):
        Outcomes(np.zeros((2, 3, 4)), np.zeros((2, 2, 4)))
    with pytest.raises(ValueError, match="leave out points"):
        Outcomes(np.full((1, 1, 1), math.nan), np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match=r"give \[P, 2\]"):
        front(np.zeros((0, 2)))
