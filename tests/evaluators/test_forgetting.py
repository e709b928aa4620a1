import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evaluators.forgetting import (
    backward_transfer,
    forgetting,
    forward_transfer,
    interval,
    libero,
    mean_over_seeds,
    summarise,
)

NAN = math.nan
R = np.array([[0.8, 0.2, 0.1], [0.6, 0.9, 0.3], [0.7, 0.5, 1.0]])
matrices = st.integers(2, 5).flatmap(lambda n: npst.arrays(np.float64, (n, n), elements=st.floats(0, 1)))


def test_transfer_and_forgetting_of_a_worked_example():
    assert backward_transfer(R) == pytest.approx(((0.7 - 0.8) + (0.5 - 0.9)) / 2)
    assert forgetting(R) == pytest.approx(((0.8 - 0.7) + (0.9 - 0.5)) / 2)
    assert forward_transfer(R, np.array([0.5, 0.1, 0.2])) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)


def test_libero_measures_of_a_worked_example():
    curves = np.array([[0.2, 0.8, 0.5], [0.9, 0.9, 0.1], [0.0, 0.5, 1.0]])
    fwt = [(0.2 + 0.8 + 0.8) / 3, 0.9, 0.5]
    nbt = [((0.8 - 0.6) + (0.8 - 0.7)) / 2, 0.9 - 0.5]
    auc = [(fwt[0] + 0.6 + 0.7) / 3, (fwt[1] + 0.5) / 2, fwt[2]]
    measures = libero(R, curves)
    assert measures["libero_fwt"] == pytest.approx(np.mean(fwt))
    assert measures["libero_nbt"] == pytest.approx(np.mean(nbt))
    assert measures["libero_auc"] == pytest.approx(np.mean(auc))


@given(matrices)
@settings(max_examples=50, deadline=None)
def test_forgetting_is_never_less_than_what_was_lost_of_what_was_learned(scores):
    assert forgetting(scores) >= max(0.0, -backward_transfer(scores)) - 1e-12


@given(matrices)
@settings(max_examples=50, deadline=None)
def test_a_learner_that_keeps_everything_loses_nothing(scores):
    kept = np.maximum.accumulate(scores, 0)
    kept[:] = kept[-1]
    assert backward_transfer(kept) == forgetting(kept) == 0
    measures = libero(kept, np.diagonal(kept)[:, None])
    assert measures["libero_nbt"] == 0
    assert measures["libero_auc"] == pytest.approx(measures["libero_fwt"])


def test_unmeasured_scores_leave_their_terms_out():
    scores = R.copy()
    scores[2, 0] = scores[0, 1] = NAN
    assert backward_transfer(scores) == pytest.approx(0.5 - 0.9)
    assert forgetting(scores) == pytest.approx(0.9 - 0.5)
    assert forward_transfer(scores, np.zeros(3)) == pytest.approx(0.3)
    measures = libero(scores, np.array([[0.4, 0.8], [NAN, 0.9], [1.0, NAN]]))
    assert measures["libero_fwt"] == pytest.approx((0.6 + 0.9 + 1) / 3)
    assert measures["libero_nbt"] == pytest.approx(((0.8 - 0.6) + (0.9 - 0.5)) / 2)
    assert np.isnan(backward_transfer(np.full((3, 3), NAN)))


def test_a_summary_averages_over_seeds_and_knows_only_what_it_was_given():
    scores = np.stack([R, R - 0.05, R * 0.5])
    summary = summarise(scores, draws=200)
    assert set(summary) == {"bwt", "forgetting", "fwt"}
    assert summary["bwt"].value == pytest.approx(np.mean([backward_transfer(r) for r in scores]))
    assert summary["bwt"].low < summary["bwt"].value < summary["bwt"].high
    assert set(summarise(scores, curves=np.ones((3, 3, 4)), draws=200)) > {
        "libero_fwt",
        "libero_nbt",
        "libero_auc",
    }
    assert summarise(scores, draws=200) == summary
    assert summarise(scores, np.full(3, 0.1), draws=200)["fwt"].value == pytest.approx(summary["fwt"].value - 0.1)


def test_one_seed_has_a_value_and_no_interval_and_none_has_neither():
    one = mean_over_seeds(np.array([0.3, NAN]))
    assert one.value == 0.3
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(mean_over_seeds(np.array([NAN])).value)


def test_of_five_seeds_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials = [mean_over_seeds(rng.normal(size=5), draws=2000, seed=i) for i in range(300)]
    assert 0.9 < np.mean([e.low <= 0 <= e.high for e in trials]) < 0.98


def test_more_seeds_or_less_confidence_narrow_the_interval():
    values = np.random.default_rng(1).normal(size=40)

    def width(*arguments, **settings):
        estimate = mean_over_seeds(*arguments, **settings)
        return estimate.high - estimate.low

    assert width(values) < width(values[:6])
    assert width(values, confidence=0.8) < width(values)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((np.zeros((3, 3)),), r"scores have shape \(3, 3\); give \[seeds, T, T\]"),
        ((np.zeros((1, 1, 1)),), "at least two tasks"),
        ((np.zeros((0, 2, 2)),), "at least two tasks"),
        ((np.zeros((1, 2, 2)), np.zeros(3)), "one value for each of the 2 tasks"),
        ((np.zeros((1, 2, 2)), None, np.zeros((1, 3, 4))), r"give \[1, 2, evaluations\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        summarise(*arguments)


@pytest.mark.parametrize(("draws", "seeds", "confidence"), [(0, 3, 0.95), (5, 0, 0.95), (5, 3, 1.0)])
def test_an_interval_of_nothing_is_refused(draws, seeds, confidence):
    with pytest.raises(ValueError, match=r"have at least one|use e\.g\."):
        interval(0.0, np.zeros(draws), seeds, confidence)
