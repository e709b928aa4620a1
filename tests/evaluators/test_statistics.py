import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.intervals import mcnemar_exact, wilson_interval

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I: method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_reproduces_published_intervals(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


@given(counts)
def test_wilson_holds_the_rate_and_stays_in_the_unit_interval(count):
    k, n = count
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1


@given(counts)
def test_wilson_is_symmetric_in_success_and_failure(count):
    k, n = count
    low, high = wilson_interval(k, n)
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(counts)
def test_more_trials_or_less_confidence_narrow_the_interval(count):
    k, n = count

    def width(*arguments):
        low, high = wilson_interval(*arguments)
        return high - low

    assert width(2 * k, 2 * n) < width(k, n)
    assert width(k, n, 0.8) < width(k, n, 0.95)


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (6, 5), (1, 5, 1.0), (1, 5, 0.0)])
def test_wilson_refuses_the_impossible(arguments):
    with pytest.raises(ValueError, match=r"use|must|needs"):
        wilson_interval(*arguments)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_tail(b, c):
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_mcnemar_known_values():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 6) == pytest.approx(2 / 64)
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 3)
