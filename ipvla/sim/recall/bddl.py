"""Writes a Recall task down in LIBERO's task format, BDDL."""

from __future__ import annotations

from typing import Final

from ipvla.sim.recall.scene import WORKSPACE_X_M, WORKSPACE_Y_M
from ipvla.sim.recall.tasks import RecallTask

#: LIBERO finds the problem's class by this name.
PROBLEM: Final = "RecallProblem"


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
    return f"""(define (problem {PROBLEM})
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
