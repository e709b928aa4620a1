"""LIBERO's own suites: lists their tasks at once, and imports the simulator only when one is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final

from ipvla.contract import SIMULATED_HAND
from ipvla.sim.altered_tasks import goal_of, scene_of
from ipvla.sim.demonstration import Demonstration, Expert, Lead, Showing
from ipvla.sim.environment import gl_environment
from ipvla.sim.libero import PACKAGES, LiberoSimulator, configure
from ipvla.sim.perturbations import DIMENSIONS, Perturbation
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.assets import assets_version, find_assets
from ipvla.sim.standard.tasks import bddl_file, initial_states, reworded, standard_tasks, unlisted_task
from ipvla.sim.suite import PROFILES, Suite, SuiteEntry, SuiteFacts

#: Of a process with one world: 1.5 GiB at the most (libero_10, original textures), and what Ray adds.
SIMULATOR_BYTES: Final = 7 * 2**28
#: Suites in which something begins on a fixture, and was drawn beside it until version 2.
_BEGIN_ON_FIXTURES: Final = ("libero_spatial", "libero_90")
#: What all suites of LIBERO's scenes have in common.
FACTS: Final = SuiteFacts(
    profiles=PROFILES,
    contract=SIMULATED_HAND,
    packages=PACKAGES,
    environment=gl_environment,
    worlds=1,
    simulator_bytes=SIMULATOR_BYTES,
)


def libero_entry(name: str, has_expert: bool = False) -> SuiteEntry:
    """The line of LIBERO's suite of this name."""
    facts = replace(
        FACTS,
        default_protocol="openvla",
        has_expert=has_expert,
        takes_over=has_expert,
        publishes_states=True,
        drawing=2 if name.startswith(_BEGIN_ON_FIXTURES) else 1,
        perturbations=tuple(one for one in DIMENSIONS if one != "language" or reworded(name)),
    )
    return SuiteEntry(name, partial(standard_suite, name, facts), partial(standard_tasks, name), facts)


def standard_suite(name: str, facts: SuiteFacts, cache_dir: Path) -> Suite:
    """The suite of this name.

    Raises:
        AssetsError: LIBERO's meshes and textures are not there.
    """
    assets = find_assets(cache_dir)
    tasks = {task.name: task for task in standard_tasks(name)}

    def build(
        wanted: str, camera_size: int, cameras: Sequence[str], profile: str, world_seed: int
    ) -> LiberoSimulator:
        configure(cache_dir, assets)
        from ipvla.sim.standard.problem import StandardProblem

        task, scene = tasks.get(wanted) or unlisted_task(name, wanted), scene_of(wanted)
        assert task is not None, "the suite has looked the name up before"
        goal = bddl_file(name, goal_of(wanted)) if goal_of(wanted) != scene else None
        states = initial_states(name, scene)
        problem = StandardProblem(bddl_file(name, scene), task, states, profile, world_seed, goal_file=goal)
        return LiberoSimulator(problem, task, camera_size, cameras)

    version = f"{metadata.version('hf-libero')}+{assets_version(assets)}"
    return Suite(
        name,
        version,
        tuple(tasks.values()),
        build,
        partial(unlisted_task, name),
        expert=_expert if facts.has_expert else None,
        demonstrate=_demonstrate if facts.has_expert else None,
        correct=_correct if facts.takes_over else None,
        perturb=perturb,
        facts=facts,
    )


def _expert(simulator: Simulator, seed: int) -> Expert:
    from ipvla.sim.standard.expert import expert  # imports MuJoCo, which the simulator has prepared

    return expert(simulator, seed)


def _demonstrate(simulator: Simulator, seed: int, showing: Showing) -> Demonstration | None:
    from ipvla.sim.standard.expert import demonstrate

    return demonstrate(simulator, seed, showing)


def _correct(simulator: Simulator, seed: int, showing: Showing, lead: Lead) -> Demonstration | None:
    from ipvla.sim.standard.expert import demonstrate

    return demonstrate(simulator, seed, showing, lead)


def perturb(simulator: Simulator, perturbation: Perturbation | None) -> None:
    """Perturbs the episodes that a simulator of LIBERO's scenes begins from now on; None to leave them."""
    from ipvla.sim.standard.problem import StandardProblem

    problem = getattr(simulator, "problem", None)
    assert isinstance(problem, StandardProblem), "a simulator of this suite"
    problem.perturb(perturbation)
