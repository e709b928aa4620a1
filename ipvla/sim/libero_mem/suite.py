"""The suite of LIBERO-Mem: lists its tasks at once, and imports the simulator only when one is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from ipvla.files import write_text
from ipvla.sim.demonstration import Demonstration, Expert, Showing
from ipvla.sim.libero import LiberoSimulator, configure
from ipvla.sim.libero_mem.tasks import SUITE, TASKS, VERSION, bddl_text
from ipvla.sim.perturbations import DIMENSIONS
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.assets import assets_version, find_assets
from ipvla.sim.standard.suite import FACTS, perturb
from ipvla.sim.suite import Suite, SuiteEntry

_FACTS = replace(
    FACTS,
    default_protocol=SUITE,
    has_expert=True,
    perturbations=tuple(one for one in DIMENSIONS if one != "language"),
)


def libero_mem_suite(cache_dir: Path) -> Suite:
    """The suite; its generated files go to `cache_dir/libero`. AssetsError if LIBERO's assets are not there."""
    assets = find_assets(cache_dir)
    listed = {task.name: task for task in TASKS}

    def build(
        name: str, camera_size: int, cameras: Sequence[str], profile: str, world_seed: int
    ) -> LiberoSimulator:
        root = configure(cache_dir, assets)
        from ipvla.sim.libero_mem.problem import SequenceProblem

        task = listed[name]
        bddl_file = root / "bddl_files" / SUITE / f"{name}.bddl"
        write_text(bddl_file, bddl_text(task))
        return LiberoSimulator(SequenceProblem(bddl_file, task, profile, world_seed), task, camera_size, cameras)

    version = f"{VERSION}+{metadata.version('hf-libero')}+{assets_version(assets)}"
    return Suite(
        SUITE, version, TASKS, build, expert=_expert, demonstrate=_demonstrate, perturb=perturb, facts=_FACTS
    )


def _expert(simulator: Simulator, seed: int) -> Expert:
    from ipvla.sim.libero_mem.expert import expert  # imports MuJoCo, which the simulator has prepared

    return expert(simulator, seed)


def _demonstrate(simulator: Simulator, seed: int, showing: Showing) -> Demonstration | None:
    from ipvla.sim.libero_mem.expert import demonstrate

    return demonstrate(simulator, seed, showing)


LIBERO_MEM = SuiteEntry(SUITE, libero_mem_suite, lambda: TASKS, _FACTS)
