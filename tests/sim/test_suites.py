"""Suites and tasks by name; listing them is cheap."""

import subprocess
import sys

import pytest

from ipvla.sim.simulator import Split
from ipvla.sim.suites import SUITES, load_suite


def test_the_recall_suite_lists_its_tasks(suite):
    assert suite.name in SUITES
    families = {
        "ground",
        "recall",
        "count",
        "place",
        "delay",
        "items",
        "order",
        "cups",
        "chase",
        "glimpse",
        "shuffle",
    }
    assert {task.family for task in suite.tasks} == families
    assert len({task.name for task in suite.tasks}) == len(suite.tasks)
    for task in suite.tasks:
        assert len(set(task.phrasings)) == len(task.phrasings) >= 3
        assert 0 <= task.chance <= 1
        assert suite.task(task.name) is task


def test_recall_is_to_be_had_with_any_delay(suite):
    listed = [task.name for task in suite.tasks if task.family == "delay"]
    assert listed == [f"recall_delay_{steps}" for steps in (20, 50, 100, 200)]
    for steps in (10, 35, 200):
        task = suite.task(f"recall_delay_{steps}")
        assert (task.name, task.family, task.delay_steps) == (f"recall_delay_{steps}", "delay", steps)
        assert task.horizon - task.locked_steps == suite.task("recall").horizon - suite.task("recall").locked_steps


@pytest.mark.parametrize("steps", [1, 9, 201, 5000])
def test_a_delay_out_of_range_is_refused(suite, steps):
    with pytest.raises(
        ValueError, match=f"'recall_delay_{steps}' has a delay of {steps} .* choose one of 10 to 200"
    ):
        suite.task(f"recall_delay_{steps}")


@pytest.mark.parametrize("name", ["recall_delay_", "recall_delay_035", "recall_delay_-5", "recall_delay_35 "])
def test_a_delay_that_is_no_number_is_no_task(suite, name):
    with pytest.raises(ValueError, match=r"is no task of suite recall\. Did you mean 'recall_delay_"):
        suite.task(name)


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
