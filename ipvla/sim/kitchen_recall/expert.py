"""The scripted expert of the kitchen's memory tasks: knows what was shown, and puts it where it belongs.

Import only after `ipvla.sim.libero.configure`, e.g. once a simulator is there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ipvla.sim.demonstration import DartNoise, Demonstration, Showing, Vector, demonstration_of
from ipvla.sim.kitchen_recall.problem import KitchenProblem
from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.expert import NOISE_SHARE, expert_rng, standard_problem
from ipvla.sim.standard.geometry import SceneGeometry
from ipvla.sim.standard.motion import PickAndPlace


class KitchenExpert:
    """Waits for the lamp, then moves the object that is wanted.

    Args:
        simulator: of this suite, at the start of an episode.
        rng: varies where it grasps and how high it travels.

    Raises:
        ValueError: the task is of another suite.
    """

    def __init__(self, simulator: Simulator, rng: np.random.Generator) -> None:
        problem = standard_problem(simulator)
        if not isinstance(problem, KitchenProblem):
            raise ValueError(f"{simulator.task.name} is no task of kitchen_recall; this expert knows only those")
        self._problem = problem
        self._hand = PickAndPlace(SceneGeometry(problem), rng)
        self._script = self._solve()

    def act(self) -> Vector:
        """float64 [7] in [-1, 1], the action for the state that the world is in now."""
        return next(self._script)

    def _solve(self) -> Iterator[Vector]:
        problem, task = self._problem, self._problem.task
        while problem.machine.locked:
            yield self._hand.rest()
        while True:
            thing, plate = problem.machine.wanted
            yield from self._hand.put("on", task.names[thing], task.plates[plate])


def expert(simulator: Simulator, seed: int) -> KitchenExpert:
    """The expert of the episode of this seed, which `simulator` is at the start of. ValueError as above."""
    return KitchenExpert(simulator, expert_rng(simulator, seed))


def demonstrate(simulator: Simulator, seed: int, showing: Showing | None = None) -> Demonstration | None:
    """One attempt of the expert at the episode of this seed; the same for the same task, seed and cameras.

    Returns:
        The demonstration, or None when the attempt failed or took longer than the task's horizon.

    Raises:
        ValueError: the task is of another suite, or the hand is to begin elsewhere.
    """
    showing = showing or Showing()
    if showing.start_offset_m:
        raise ValueError(f"start_offset_m is {showing.start_offset_m}; the hand has one place here: give 0")
    rng = expert_rng(simulator, seed)
    simulator.reset(seed)
    solver = KitchenExpert(simulator, rng)
    assert isinstance(simulator, LiberoSimulator), "the expert checks this"
    return demonstration_of(solver, simulator, seed, DartNoise(rng, NOISE_SHARE), showing.watch(simulator))
