"""Which lines of the pages are commands, and which of them count as run."""

from __future__ import annotations

import re

import pytest

from benchmarks.journeys import ELSEWHERE, executed, targets, typo_s, written
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.jobs import JOBS


def test_commands_are_those_that_a_reader_types() -> None:
    lines = written()
    assert len(lines) > 80
    assert {"make quickstart", "ipvla doctor"} <= set(lines)
    assert not [line for line in lines if line.startswith(("#", "export", "import ", "from "))]


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_what_counts_as_run_elsewhere_is_a_test(test: str) -> None:
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (SOURCE_TREE / file).read_text(), re.MULTILINE)


def test_a_line_is_run_if_it_was_logged_or_has_a_test_elsewhere() -> None:
    lines = ["make quickstart", "ipvla doctor", "python -m studies.libero --parts '[object]'"]
    assert executed(lines, ["ipvla doctor", "ipvla train"]) == lines[1:]


def test_a_typo_is_answered_at_once() -> None:
    assert 0 < typo_s() < 10, "on a busy machine; the record has the bound"


def test_what_was_not_measured_is_not_met() -> None:
    figures = {"typo_s": 1.0, "silent_s_max": 20.0, "help_jobs": len(JOBS), "fields_without_help": 0}
    found = {target.name: target.to_dict()["met"] for target in targets({**figures, "docs_words": 14_001})}
    assert found == {
        "journeys_done": False,
        "commands_in_docs_run": False,
        "typo_s": True,
        "silent_s_max": True,
        "help_jobs": True,
        "fields_without_help": True,
        "docs_words": False,
    }
