"""Published tables say what the results say."""

from pathlib import Path

import pytest

from benchmarks.record import Target
from benchmarks.tables import PAGES, rendered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_tables_are_those_of_the_results(page: Path) -> None:
    assert "<!-- /" in page.read_text()
    assert rendered(page) == page.read_text(), "run python -m benchmarks.tables"


def test_a_target_is_met_on_its_own_side_of_the_bound() -> None:
    assert Target("rate", 0.9, 0.85, at_least=True).met
    assert not Target("rate", 0.8, 0.85, at_least=True).met
    assert Target("cost", 5.0, 8.0, at_least=False).met
    assert not Target("cost", 9.0, 8.0, at_least=False).met
