"""The Recall suite: lists its tasks at once, and imports the simulator only when one is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipvla.contract import HAND
from ipvla.files import write_text
from ipvla.sim.environment import gl_environment
from ipvla.sim.libero import CAMERA, PACKAGES, LiberoSimulator, configure
from ipvla.sim.recall.arena import arena_mjcf
from ipvla.sim.recall.bddl import bddl_text
from ipvla.sim.recall.expert import demonstrate, expert
from ipvla.sim.recall.tasks import TASKS, VERSION, RecallTask, unlisted_task
from ipvla.sim.suite import Suite, SuiteEntry, SuiteFacts

_FACTS = SuiteFacts(contract=HAND, has_expert=True, packages=PACKAGES, environment=gl_environment)


def recall_suite(cache_dir: Path) -> Suite:
    """The embedded suite. Its generated files go to `cache_dir/libero`."""

    listed = {task.name: task for task in TASKS}

    def build(
        name: str, camera_size: int, cameras: Sequence[str], _profile: str, _world_seed: int
    ) -> LiberoSimulator:
        task = listed.get(name) or unlisted_task(name)
        assert task is not None, "the suite has looked the name up before"
        return build_simulator(task, cache_dir, camera_size, cameras)

    return Suite("recall", VERSION, TASKS, build, unlisted_task, expert, demonstrate, _FACTS)


def build_simulator(
    task: RecallTask, cache_dir: Path, camera_size: int = 64, cameras: Sequence[str] = (CAMERA,)
) -> LiberoSimulator:
    """A simulator of any Recall task, listed in the suite or not."""
    root = configure(cache_dir)
    from ipvla.sim.recall.problem import RecallProblem

    bddl_file = root / "bddl_files" / "recall" / f"{task.name}.bddl"
    arena_file = root / "recall_arena.xml"
    write_text(bddl_file, bddl_text(task))
    write_text(arena_file, arena_mjcf())
    return LiberoSimulator(RecallProblem(bddl_file, arena_file, task), task, camera_size, cameras)


RECALL = SuiteEntry("recall", recall_suite, lambda: TASKS, _FACTS)
