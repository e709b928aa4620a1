import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evaluators.pareto import Box, Outcomes, area, estimate, front, gap, retention_at

levels = st.integers(0, 8).map(lambda k: k / 8)
point_sets = st.integers(1, 9).flatmap(lambda n: npst.arrays(np.float64, (n, 2), elements=levels))
quick = settings(max_examples=60, deadline=None)
UNIT = Box()


def outcomes(new, old, seeds=5, scenes=200, seed=0):
    """Coin flips whose rates at point p are new[p] and old[p]; a scene is as hard for every method."""
    ease = np.random.default_rng(99).normal(0, 0.2, scenes)
    rng = np.random.default_rng(seed)

    def play(rates):
        p = np.clip(np.asarray(rates)[None, :, None] + ease, 0, 1)
        return (rng.random((seeds, len(rates), scenes)) < p).astype(float)

    return Outcomes(play(new), play(old))


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
def test_the_area_is_the_share_of_the_box_with_a_better_point(points):
    x, y = np.meshgrid((np.arange(8) + 0.5) / 8, (np.arange(8) + 0.5) / 8)
    covered = ((points[:, 0, None, None] > x) & (points[:, 1, None, None] > y)).any(0)
    assert area(points, UNIT) == pytest.approx(covered.mean())


@given(point_sets, st.tuples(levels, levels))
@quick
def test_another_point_never_shrinks_the_area_and_a_dominated_one_changes_nothing(points, extra):
    more = np.concatenate([points, [extra]])
    assert area(more, UNIT) >= area(points, UNIT)
    assert area(np.concatenate([points, [points[0] / 2]]), UNIT) == pytest.approx(area(points, UNIT))


def test_the_box_cuts_and_scales():
    points = np.array([[0.5, 0.9], [0.9, 0.5]])
    assert area(points, UNIT) == pytest.approx(0.5 * 0.9 + 0.4 * 0.5)
    assert area(points, Box(new=(0.5, 1.0), old=(0.5, 1.0))) == pytest.approx(0.0)
    assert area(points, Box(new=(0.4, 0.6), old=(0.4, 0.6))) == pytest.approx((0.1 * 0.2 + 0.1 * 0.1) / 0.04)
    with pytest.raises(ValueError, match=r"box\.old is \(1\.0, 1\.0\)"):
        Box(old=(1.0, 1.0))


def test_retention_at_equal_success_lies_on_the_line_between_neighbours():
    points = np.array([[0.4, 0.9], [0.8, 0.5], [0.5, 0.1]])
    assert retention_at(points, 0.5) == pytest.approx(0.8)
    assert retention_at(points, 0.8) == pytest.approx(0.5)
    assert retention_at(points, 0.1) == pytest.approx(0.9)
    assert math.isnan(retention_at(points, 0.81))
    assert retention_at(points, 0.81, otherwise=0.0) == 0.0


@given(point_sets, st.tuples(levels, levels))
@quick
def test_retention_falls_along_the_front(points, where):
    low, high = sorted(where)
    assert retention_at(points, low, -1.0) >= retention_at(points, high, -1.0)


def test_a_method_and_itself_differ_by_nothing_in_every_draw():
    one = outcomes([0.3, 0.6, 0.8], [0.9, 0.7, 0.3])
    difference = gap(partial(area, box=UNIT), one, one, draws=50)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_a_gap_is_told_apart_by_its_interval_and_turns_its_sign_with_the_methods():
    better, worse = outcomes([0.3, 0.7], [0.9, 0.7]), outcomes([0.3, 0.7], [0.8, 0.5], seed=1)
    statistic = partial(area, box=UNIT)
    ahead, behind = gap(statistic, better, worse, draws=400), gap(statistic, worse, better, draws=400)
    assert ahead.value == pytest.approx(area(better.points, UNIT) - area(worse.points, UNIT))
    assert 0 < ahead.low < ahead.value < ahead.high
    assert behind.value == pytest.approx(-ahead.value)
    assert (behind.low, behind.high) == pytest.approx((-ahead.high, -ahead.low))
    at_half = gap(partial(retention_at, new=0.5, otherwise=0.0), better, worse, draws=400)
    assert 0 < at_half.low < at_half.value < at_half.high


def test_scenes_that_both_played_narrow_the_gap():
    """Difficulty that the scenes share cancels in the gap and not in the areas."""
    hard = np.random.default_rng(0).random((5, 1, 60))
    first = Outcomes(np.full((5, 1, 60), 0.8), np.broadcast_to(hard[:1], (5, 1, 60)))
    second = Outcomes(first.new, np.broadcast_to(hard[:1] * 0.9, (5, 1, 60)))
    statistic = partial(area, box=UNIT)
    alone, difference = estimate(statistic, first, draws=300), gap(statistic, first, second, draws=300)
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)


def test_seeds_that_differ_widen_the_interval():
    rates = np.linspace(-0.2, 0.2, 5)[:, None, None]
    alike = Outcomes(np.full((5, 1, 4), 0.8), np.full((5, 1, 4), 0.6))
    differing = Outcomes(alike.new, alike.old + rates)
    statistic = partial(area, box=UNIT)
    narrow, wide = estimate(statistic, alike, draws=200), estimate(statistic, differing, draws=200)
    assert narrow.value == pytest.approx(wide.value)
    assert narrow.high - narrow.low == pytest.approx(0, abs=1e-9)
    assert wide.high - wide.low > 0.1


def test_the_same_seed_draws_the_same_interval_and_one_training_seed_has_none():
    statistic = partial(area, box=UNIT)
    many, one = outcomes([0.5], [0.5], scenes=30), outcomes([0.5], [0.5], seeds=1, scenes=30)
    assert estimate(statistic, many, draws=50) == estimate(statistic, many, draws=50)
    assert math.isnan(estimate(statistic, one, draws=50).low)


def test_what_cannot_be_compared_is_refused():
    first = outcomes([0.5], [0.5])
    with pytest.raises(ValueError, match="compare them on the same seeds and scenes"):
        gap(partial(area, box=UNIT), first, outcomes([0.5], [0.5], scenes=199))
    with pytest.raises(ValueError, match=r"undefined in \d+ of 50 draws; compare at a new-task success that"):
        estimate(partial(retention_at, new=0.5), first, draws=50)
    with pytest.raises(ValueError, match="with the same seeds and points"):
        Outcomes(np.zeros((2, 3, 4)), np.zeros((2, 2, 4)))
    with pytest.raises(ValueError, match="leave out points"):
        Outcomes(np.full((1, 1, 1), math.nan), np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match=r"give \[P, 2\]"):
        front(np.zeros((0, 2)))
