"""The house's figures count what they say."""

from __future__ import annotations

from pathlib import Path

from benchmarks.house import BEFORE, BOUNDS, measure, quickstart_figures, targets
from ipvla.storage import SOURCE_TREE
from studies.record import read_record


def test_modules_and_lines_are_counted_without_tests_blank_lines_and_empty_modules(tmp_path: Path) -> None:
    for name, text in {
        "ipvla/a.py": "one\n\n  \ntwo\n",
        "ipvla/sub/__init__.py": "",
        "studies/b.py": "one\n",
        "benchmarks/c.py": "one\ntwo\nthree",
        "tests/test_d.py": "one\n" * 9,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert measure(tmp_path) == {"files": 3, "lines": 6, "benchmarks_lines": 4}


def test_speed_checks_and_studies_are_the_smaller_part_of_this_tree() -> None:
    found = measure(SOURCE_TREE)
    assert found["files"] > 100
    assert 0 < found["benchmarks_lines"] < found["lines"] / 6


def test_every_bound_is_a_target_and_what_was_not_measured_is_not_met() -> None:
    figures = {
        "before": BEFORE,
        "files": 280,
        "lines": 30_001,
        "quickstart_count_gru": 0.95,
        "gripper_right": None,
    }
    found = {target.name: target for target in targets(figures)}
    assert list(found) == list(BOUNDS)
    assert [name for name, target in found.items() if target.met] == ["quickstart_count_gru", "files"]
    assert found["lines"].note == "before: 33592"


def test_the_quickstarts_figures_are_those_of_its_record() -> None:
    found = quickstart_figures(read_record("quickstart"))
    assert 0 < found["quickstart_minutes"] < 60
    assert 0 < found["quickstart_count_gru"] <= 1
    assert quickstart_figures(None) == {}
