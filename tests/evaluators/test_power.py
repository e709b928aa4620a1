"""How large a difference must be for an evaluation to find it is told before it is run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.intervals import mcnemar_exact, minimum_detectable_difference


@pytest.mark.parametrize(("pairs", "discordant"), [(100, 0.3), (500, 0.2), (500, 0.5)])
def test_it_is_found_as_often_as_promised(pairs: int, discordant: float) -> None:
    d = minimum_detectable_difference(pairs, discordant)
    rng = np.random.default_rng(0)
    shares = [(discordant + d) / 2, (discordant - d) / 2, 1 - discordant]
    found = [mcnemar_exact(int(a), int(b)) < 0.05 for a, b, _ in rng.multinomial(pairs, shares, 1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.07)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.floats(0.01, 1))
def test_more_pairs_show_more(pairs: int, discordant: float) -> None:
    d = minimum_detectable_difference(pairs, discordant)
    assert 0 < d <= discordant
    assert minimum_detectable_difference(2 * pairs, discordant) <= d


def test_what_docs_rollout_says_of_it() -> None:
    assert minimum_detectable_difference(500, 0.2) == pytest.approx(0.056, abs=5e-4)
    assert minimum_detectable_difference(50, 0.2) == pytest.approx(0.17, abs=5e-3)


def test_what_makes_no_sense_is_refused() -> None:
    for arguments in ((0, 0.2), (10, 0.0), (10, 1.5)):
        with pytest.raises(ValueError, match=r"pairs show nothing|discordant is"):
            minimum_detectable_difference(*arguments)
