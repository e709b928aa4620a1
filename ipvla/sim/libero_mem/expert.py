"""The scripted expert of LIBERO-Mem: sees the true state, and reaches one sub-goal after another.

Import only after `ipvla.sim.libero.configure`, e.g. once a simulator is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ipvla.sim.demonstration import Demonstration, Showing, Vector
from ipvla.sim.libero_mem.problem import SequenceProblem
from ipvla.sim.libero_mem.progress import ABSENT_STEPS, Goal
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.expert import demonstration_by, expert_rng, standard_problem
from ipvla.sim.standard.geometry import SceneGeometry
from ipvla.sim.standard.motion import PickAndPlace

#: The hand goes up by 12 cm, no longer: seven lifts and the rest afterwards fit into an episode.
_STEPS_AWAY: Final = 12


class SequenceExpert:
    """Takes the way of a task whose first sub-goal is nearest, and rests once it is at the end.

    Args:
        simulator: of LIBERO-Mem, at the start of an episode, settled or not.
        rng: varies where it grasps and how high it travels.

    Raises:
        ValueError: the task is of another suite.
    """

    def __init__(self, simulator: Simulator, rng: np.random.Generator) -> None:
        problem = standard_problem(simulator)
        if not isinstance(problem, SequenceProblem):
            raise ValueError(f"{simulator.task.name} is no task of libero_mem; this expert knows only those")
        self._progress, self._rng = problem.progress, rng
        self._scene = SceneGeometry(problem)
        self._script = self._solve()

    def act(self) -> Vector:
        """float64 [7] in [-1, 1], the action for the state that the world is in now."""
        return next(self._script)

    def _solve(self) -> Iterator[Vector]:
        progress = self._progress
        way = min(range(len(progress.sequences)), key=lambda way: self._distance_m(progress.sequences[way][0]))
        home = self._scene.opening()
        hand = PickAndPlace(self._scene, self._rng, home)
        while (due := progress.reached) < progress.subgoals:
            goal = progress.sequences[way][due]
            yield from hand.put(*goal, lifted=lambda: progress.absent[way] > ABSENT_STEPS, steps_away=_STEPS_AWAY)
            if progress.reached > due:  # else once more, with the next best grasp
                hand = PickAndPlace(self._scene, self._rng, home)
        while True:
            yield hand.rest()

    def _distance_m(self, goal: Goal) -> float:
        _, thing, where = goal
        return float(np.linalg.norm((self._scene.place(thing) - self._scene.place(where))[:2]))


def expert(simulator: Simulator, seed: int) -> SequenceExpert:
    """The expert of the episode of this seed, which `simulator` is at the start of. ValueError as above."""
    return SequenceExpert(simulator, expert_rng(simulator, seed))


def demonstrate(simulator: Simulator, seed: int, showing: Showing | None = None) -> Demonstration | None:
    """One attempt of the expert, from when the episode has settled; as `ipvla.sim.standard.expert.demonstrate`."""
    return demonstration_by(SequenceExpert, simulator, seed, showing or Showing())
