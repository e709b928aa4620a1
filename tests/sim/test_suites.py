"""Suites and tasks by name; listing them is cheap."""

import subprocess
import sys

import pytest

from ipvla.sim.simulator import Split
from ipvla.sim.suites import SUITES, load_suite


def test_the_recall_suite_lists_its_tasks(suite):
    assert suite.name in SUITES
    assert {task.family for task in suite.tasks} == {"ground", "recall", "count", "place"}
    assert len({task.name for task in suite.tasks}) == len(suite.tasks)
    for task in suite.tasks:
        assert len(set(task.phrasings)) == len(task.phrasings) >= 3
        assert 0 <= task.chance <= 1
        assert suite.task(task.name) is task


def test_listing_tasks_imports_no_physics_engine(cache_dir):
    code = f"""
import sys
from pathlib import Path
from ipvla.sim.suites import load_suite
from ipvla.sim.recall.expert import demonstrate
from ipvla.sim.fingerprint import fingerprint
assert load_suite("recall", Path({str(cache_dir)!r})).tasks and fingerprint()
heavy = {{"mujoco", "robosuite", "libero", "OpenGL", "numba"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_suite_or_task_is_refused_with_a_suggestion(suite, cache_dir):
    with pytest.raises(ValueError, match=r"'recal' is no suite\. Did you mean 'recall'"):
        load_suite("recal", cache_dir)
    with pytest.raises(ValueError, match="Choose one of: recall"):
        load_suite("zzz", cache_dir)
    with pytest.raises(ValueError, match=r"'ground_rde' is no task of suite recall\. Did you mean 'ground_red'"):
        suite.simulator("ground_rde")


def test_train_and_held_out_seeds_cannot_overlap():
    last = 2**31 - 1
    assert Split.TRAIN.seed(0) == 0
    assert Split.TRAIN.seed(last) < Split.HELD_OUT.seed(0)
    assert Split.HELD_OUT.seed(last) == 2**32 - 1
    for split in Split:
        for index in (-1, last + 1):
            with pytest.raises(ValueError, match="layout index"):
                split.seed(index)
