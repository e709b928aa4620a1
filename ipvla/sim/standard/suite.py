"""LIBERO's own suites: lists their tasks at once, and imports the simulator only when one is built."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ipvla.sim.demonstration import Demonstration
from ipvla.sim.expert import Expert
from ipvla.sim.libero import LiberoSimulator, configure
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.assets import assets_version, find_assets
from ipvla.sim.standard.tasks import bddl_file, initial_states, standard_tasks
from ipvla.sim.suites import EXPERT_SUITES, Suite


def standard_suite(name: str, cache_dir: Path) -> Suite:
    """The suite of this name.

    Raises:
        AssetsError: LIBERO's meshes and textures are not there.
    """
    assets = find_assets(cache_dir)
    tasks = {task.name: task for task in standard_tasks(name)}

    def build(
        task: str, camera_size: int, cameras: Sequence[str], profile: str, world_seed: int
    ) -> LiberoSimulator:
        configure(cache_dir, assets)
        from ipvla.sim.standard.problem import StandardProblem

        states = initial_states(name, task)
        problem = StandardProblem(bddl_file(name, task), tasks[task], states, profile, world_seed)
        return LiberoSimulator(problem, tasks[task], camera_size, cameras)

    version = f"{metadata.version('hf-libero')}+{assets_version(assets)}"
    solved = name in EXPERT_SUITES
    return Suite(
        name,
        version,
        tuple(tasks.values()),
        build,
        expert=_expert if solved else None,
        demonstrate=_demonstrate if solved else None,
    )


def _expert(simulator: Simulator, seed: int) -> Expert:
    from ipvla.sim.standard.expert import expert  # imports MuJoCo, which the simulator has prepared

    return expert(simulator, seed)


def _demonstrate(simulator: Simulator, seed: int) -> Demonstration | None:
    from ipvla.sim.standard.expert import demonstrate

    return demonstrate(simulator, seed)
