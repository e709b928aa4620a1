"""The scripted expert of LIBERO's own suites: sees the true state, picks one object up and puts it somewhere.

It covers tasks whose goal is one object on or in another: all of libero_spatial and libero_object.

Import only after `ipvla.sim.libero.configure`, e.g. once a simulator is there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import chain, count
from typing import Final

import numpy as np

from ipvla.sim.demonstration import DartNoise, Demonstration, Expert, Lead, Showing, Vector, demonstration_of
from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.geometry import SceneGeometry
from ipvla.sim.standard.motion import GAIN_PER_M, OPEN, PickAndPlace
from ipvla.sim.standard.premises import settle
from ipvla.sim.standard.problem import StandardProblem

_STEPS_TO_MOVE_AWAY: Final = 25
#: How much noise demonstrations bear.
NOISE_SHARE: Final = 0.5


class PickAndPlaceExpert:
    """Puts the object of a task's goal where the goal wants it, one action at a time.

    Args:
        simulator: of a task of LIBERO's own suites, at the start of an episode, settled or not.
        rng: varies where it grasps and how high it travels.

    Raises:
        ValueError: the task wants something else than one object put somewhere.
    """

    def __init__(self, simulator: Simulator, rng: np.random.Generator) -> None:
        scene = SceneGeometry(standard_problem(simulator))
        goal = scene.goal()
        hand = PickAndPlace(scene, rng)
        self._script = chain.from_iterable(hand.put(*goal) for _ in count())

    def act(self) -> Vector:
        """float64 [7] in [-1, 1], the action for the state that the world is in now."""
        return next(self._script)


def expert(simulator: Simulator, seed: int) -> PickAndPlaceExpert:
    """The expert of the episode of this seed, which `simulator` is at the start of.

    Raises:
        ValueError: the task wants something else than one object put somewhere.
    """
    return PickAndPlaceExpert(simulator, expert_rng(simulator, seed))


def _move_away(simulator: Simulator, rng: np.random.Generator, offset_m: float) -> None:
    """The open hand to a place beside or above where it is; never lower, where objects are."""
    scene = SceneGeometry(standard_problem(simulator))
    goal = scene.hand() + rng.uniform([-offset_m, -offset_m, 0.0], offset_m)
    for _ in range(_STEPS_TO_MOVE_AWAY):
        motion = np.clip((goal - scene.hand()) * GAIN_PER_M, -1.0, 1.0)
        simulator.step(np.array([*motion, 0.0, 0.0, 0.0, OPEN]))


def expert_rng(simulator: Simulator, seed: int) -> np.random.Generator:
    """What varies an expert's motion in the episode of this seed."""
    return np.random.default_rng([seed, zlib.crc32(simulator.task.name.encode())])


def standard_problem(simulator: Simulator) -> StandardProblem:
    """A simulator's problem; ValueError if it is none of this kind."""
    problem = simulator.problem if isinstance(simulator, LiberoSimulator) else None
    if not isinstance(problem, StandardProblem):
        raise ValueError(f"{simulator.task.name} is no task of LIBERO's own suites; this expert knows only those")
    return problem


def demonstrate(
    simulator: Simulator, seed: int, showing: Showing | None = None, lead: Lead | None = None
) -> Demonstration | None:
    """One attempt of the expert at the episode of this seed, from when it has settled.

    With `showing.start_offset_m` the hand is moved before, unseen, up to that far along each axis (never down).
    `lead` plays then, unseen too, and the expert goes on from where it leads.

    Returns:
        The demonstration, or None when the attempt took longer than the task's horizon.

    Raises:
        ValueError: the task wants something else than one object put somewhere.
    """
    return demonstration_by(PickAndPlaceExpert, simulator, seed, showing or Showing(), lead)


def demonstration_by(
    solver: Callable[[Simulator, np.random.Generator], Expert],
    simulator: Simulator,
    seed: int,
    showing: Showing,
    lead: Lead | None = None,
) -> Demonstration | None:
    """The same, of another expert: `solver` makes it at the start of the episode."""
    rng = expert_rng(simulator, seed)
    simulator.reset(seed)
    settle(simulator)
    if showing.start_offset_m:
        _move_away(simulator, rng, showing.start_offset_m)
    if lead is not None:
        lead(simulator, rng)
    expert = solver(simulator, rng)
    assert isinstance(simulator, LiberoSimulator), "the expert checks this"
    return demonstration_of(expert, simulator, seed, DartNoise(rng, NOISE_SHARE), showing.watch(simulator))
