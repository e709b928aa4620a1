"""The Recall suite: lists its tasks at once, writes LIBERO's files and imports the simulator when one is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipvla.contract import SIMULATED_HAND
from ipvla.files import write_text
from ipvla.sim.environment import gl_environment
from ipvla.sim.libero import PACKAGES, LiberoSimulator, configure
from ipvla.sim.recall.expert import demonstrate, expert
from ipvla.sim.recall.scene import WORKSPACE_X_M, WORKSPACE_Y_M, arena_mjcf
from ipvla.sim.recall.tasks import TASKS, VERSION, RecallTask, unlisted_task
from ipvla.sim.suite import Suite, SuiteEntry, SuiteFacts

_FACTS = SuiteFacts(contract=SIMULATED_HAND, has_expert=True, packages=PACKAGES, environment=gl_environment)


def recall_suite(cache_dir: Path) -> Suite:
    """The embedded suite. Its generated files go to `cache_dir/libero`."""

    listed = {task.name: task for task in TASKS}

    def build(
        name: str, camera_size: int, cameras: Sequence[str], _profile: str, _world_seed: int
    ) -> LiberoSimulator:
        task = listed.get(name) or unlisted_task(name)
        assert task is not None, "the suite has looked the name up before"
        root = configure(cache_dir)
        from ipvla.sim.recall.problem import RecallProblem

        bddl_file = root / "bddl_files" / "recall" / f"{task.name}.bddl"
        arena_file = root / "recall_arena.xml"
        write_text(bddl_file, bddl_text(task))
        write_text(arena_file, arena_mjcf())
        return LiberoSimulator(RecallProblem(bddl_file, arena_file, task), task, camera_size, cameras)

    return Suite("recall", VERSION, TASKS, build, unlisted_task, expert, demonstrate, facts=_FACTS)


def bddl_text(task: RecallTask) -> str:
    """The task's BDDL file: objects, the region they lie in, the goal and the first phrasing.

    BDDL has no words for cues and delays: those reach the problem as the `RecallTask` itself.
    """
    # One group per category: LIBERO's parser keeps only the last of two groups with one name.
    objects = "\n    ".join(
        " ".join(name for name, of in zip(task.names, task.objects, strict=True) if of == category)
        + f" - {category}"
        for category in dict.fromkeys(task.objects)
    )
    region = f"{WORKSPACE_X_M[0]} {WORKSPACE_Y_M[0]} {WORKSPACE_X_M[1]} {WORKSPACE_Y_M[1]}"
    initial = "\n    ".join(f"(On {name} main_table_workspace)" for name in task.names)
    return f"""(define (problem RecallProblem)
  (:domain robosuite)
  (:language {task.phrasings[0]})
  (:regions
    (workspace
      (:target main_table)
      (:ranges (({region})))
    )
  )
  (:fixtures main_table - table)
  (:objects
    {objects}
  )
  (:obj_of_interest {" ".join(task.names)})
  (:init
    {initial}
  )
  (:goal (And {_goal(task)}))
)
"""


def _goal(task: RecallTask) -> str:
    if task.program:
        return f"(PressedInOrder {' '.join(task.names[i] for i in task.program)})"
    if task.items:
        return f"(PressedCue {' '.join(task.names)})"
    return f"(In {' '.join(task.names)})"


RECALL = SuiteEntry("recall", recall_suite, lambda: TASKS, _FACTS)
