"""The generated task files are LIBERO's format: its own parser reads them."""

import pytest

from ipvla.sim.libero import configure
from ipvla.sim.recall.suite import bddl_text
from ipvla.sim.recall.tasks import TASKS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_libero_reads_the_task_back(task, cache_dir, tmp_path):
    configure(cache_dir)
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    file = tmp_path / "task.bddl"
    file.write_text(bddl_text(task))
    problem = robosuite_parse_problem(str(file))
    assert problem["problem_name"] == "recallproblem"
    assert " ".join(problem["language_instruction"]) == task.phrasings[0]
    assert sorted(name for names in problem["objects"].values() for name in names) == sorted(task.names)
    assert set(problem["objects"]) == set(task.objects)
    assert len(problem["initial_state"]) == len(task.objects)
    assert len(problem["goal_state"]) == 1
