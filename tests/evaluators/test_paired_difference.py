import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.intervals import bootstrap_difference, newcombe_paired_interval

tables = st.tuples(*[st.integers(0, 200)] * 4).filter(any)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Altman et al., Statistics with Confidence (2000), table 6.2.
        ((14, 5, 0, 22), 0.011, 0.226),
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), chapter 8.
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_newcombe_reproduces_published_intervals(table, low, high):
    assert newcombe_paired_interval(*table) == pytest.approx((low, high), abs=6e-4)


@given(tables)
def test_the_interval_holds_the_difference_and_stays_possible(table):
    _, first, second, _ = table
    low, high = newcombe_paired_interval(*table)
    difference = (first - second) / sum(table)
    assert -1 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1


@given(tables)
def test_exchanging_the_policies_mirrors_the_interval(table):
    both, first, second, neither = table
    low, high = newcombe_paired_interval(*table)
    assert newcombe_paired_interval(both, second, first, neither) == pytest.approx((-high, -low), abs=1e-9)


@given(tables)
def test_success_and_failure_are_treated_alike(table):
    both, first, second, neither = table
    other = newcombe_paired_interval(neither, first, second, both)
    assert newcombe_paired_interval(*table) == pytest.approx(other, abs=1e-9)


def test_pairs_that_agree_narrow_the_interval():
    paired, at_random = newcombe_paired_interval(45, 5, 5, 45), newcombe_paired_interval(25, 25, 25, 25)
    assert at_random[0] < paired[0] < 0 < paired[1] < at_random[1]


@pytest.mark.parametrize("arguments", [(0, 0, 0, 0), (-1, 1, 1, 1), (1, 1, 1, 1, 1.0)])
def test_the_impossible_is_refused(arguments):
    with pytest.raises(ValueError, match=r"negative|needs|use"):
        newcombe_paired_interval(*arguments)


counts = st.tuples(*[st.integers(0, 60)] * 3)


@given(st.lists(counts, min_size=1, max_size=10).filter(lambda strata: max(map(sum, strata)) > 1))
def test_the_bootstrap_interval_stays_possible_and_is_always_the_same(strata):
    low, high = bootstrap_difference(strata, resamples=200)
    assert -1 <= low <= high <= 1
    assert bootstrap_difference(strata, resamples=200) == (low, high)


def test_the_bootstrap_agrees_with_the_paired_interval_on_many_layouts():
    both, first, second, neither = 230, 60, 30, 180
    expected = newcombe_paired_interval(both, first, second, neither)
    assert bootstrap_difference([(first, second, both + neither)]) == pytest.approx(expected, abs=0.006)


def test_tasks_that_differ_among_themselves_do_not_widen_the_bootstrap_interval():
    apart, mixed = [(10, 0, 0), (0, 10, 0)], [(5, 5, 0), (5, 5, 0)]
    assert bootstrap_difference(apart) == (0.0, 0.0)
    low, high = bootstrap_difference(mixed)
    assert low < -0.3
    assert high > 0.3


def test_of_one_layout_per_task_there_is_no_interval():
    for strata in ([(0, 0, 1)], [(1, 0, 0)], [(1, 0, 0), (0, 1, 0), (0, 0, 1)]):
        assert bootstrap_difference(strata) is None
    assert bootstrap_difference([(0, 0, 2), (1, 0, 0)]) is not None


def test_a_bootstrap_of_nothing_is_refused():
    for strata in ([], [(0, 0, 0)], [(1, -1, 3)]):
        with pytest.raises(ValueError, match="counts of pairs are"):
            bootstrap_difference(strata)
