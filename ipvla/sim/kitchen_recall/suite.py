"""The kitchen's memory suite: lists its tasks at once, and imports the simulator only when one is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from ipvla.files import write_text
from ipvla.sim.demonstration import Demonstration, Expert, Showing
from ipvla.sim.kitchen_recall.tasks import SUITE, TASKS, VERSION, bddl_text, unlisted_task
from ipvla.sim.libero import LiberoSimulator, configure
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.assets import assets_version, find_assets
from ipvla.sim.standard.suite import FACTS
from ipvla.sim.suite import Suite, SuiteEntry

_FACTS = replace(FACTS, has_expert=True)


def kitchen_recall_suite(cache_dir: Path) -> Suite:
    """The suite; its generated files go to `cache_dir/libero`. AssetsError if LIBERO's assets are not there."""
    assets = find_assets(cache_dir)
    listed = {task.name: task for task in TASKS}

    def build(
        name: str, camera_size: int, cameras: Sequence[str], profile: str, world_seed: int
    ) -> LiberoSimulator:
        root = configure(cache_dir, assets)
        from ipvla.sim.kitchen_recall.problem import KitchenProblem

        task = listed.get(name) or unlisted_task(name)
        assert task is not None, "the suite has looked the name up before"
        bddl_file = root / "bddl_files" / SUITE / f"{name}.bddl"
        write_text(bddl_file, bddl_text(task))
        return LiberoSimulator(KitchenProblem(bddl_file, task, profile, world_seed), task, camera_size, cameras)

    version = f"{VERSION}+{metadata.version('hf-libero')}+{assets_version(assets)}"
    return Suite(SUITE, version, TASKS, build, unlisted_task, _expert, _demonstrate, facts=_FACTS)


def _expert(simulator: Simulator, seed: int) -> Expert:
    from ipvla.sim.kitchen_recall.expert import expert  # imports MuJoCo, which the simulator has prepared

    return expert(simulator, seed)


def _demonstrate(simulator: Simulator, seed: int, showing: Showing) -> Demonstration | None:
    from ipvla.sim.kitchen_recall.expert import demonstrate

    return demonstrate(simulator, seed, showing)


KITCHEN_RECALL = SuiteEntry(SUITE, kitchen_recall_suite, lambda: TASKS, _FACTS)
