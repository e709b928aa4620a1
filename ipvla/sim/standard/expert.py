"""The scripted expert of LIBERO's own suites: sees the true state, picks one object up and puts it somewhere.

It covers tasks whose goal is one object on or in another: all of libero_spatial and libero_object.

Import only after `ipvla.sim.libero.configure`, e.g. once a simulator is there.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from typing import Final

import numpy as np

from ipvla.sim.demonstration import DartNoise, Demonstration, Lead, Showing, Vector, demonstration_of
from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.simulator import Simulator
from ipvla.sim.standard.geometry import SceneGeometry
from ipvla.sim.standard.grasp import TIPS_M, Grasp, directions, plan_grasp, turn
from ipvla.sim.standard.premises import settle
from ipvla.sim.standard.problem import StandardProblem

#: Action per metre and per radian of error.
_GAIN_PER_M, _GAIN_PER_RAD = 30.0, 4.0
_OPEN, _CLOSE = -1.0, 1.0

_CLEARANCE_M: Final = 0.04
_STEPS_TO_OPEN: Final = 4
_STEPS_TO_MOVE_AWAY: Final = 25
#: Steps without coming nearer after which something is in the way.
_STALLED_STEPS: Final = 12
_NOISE_SHARE: Final = 0.5


class PickAndPlaceExpert:
    """Puts the object of a task's goal where the goal wants it, one action at a time.

    Args:
        simulator: of a task of LIBERO's own suites, at the start of an episode, settled or not.
        rng: varies where it grasps and how high it travels.

    Raises:
        ValueError: the task wants something else than one object put somewhere.
    """

    def __init__(self, simulator: Simulator, rng: np.random.Generator) -> None:
        self._scene = SceneGeometry(_standard_problem(simulator))
        self._relation, self._name, self._target = self._scene.goal()
        self._jitter_m = float(rng.normal(0.0, 0.002))
        self._higher_m = float(rng.uniform(0.0, 0.02))
        self._tried = 0
        self._script = self._solve()

    def act(self) -> Vector:
        """float64 [7] in [-1, 1], the action for the state that the world is in now."""
        return next(self._script)

    def _solve(self) -> Iterator[Vector]:
        """Actions without end: it begins again, with another grasp, when one fails or the object slips."""
        while True:
            grasp = plan_grasp(self._scene, self._name, self._tried)
            if (yield from self._reach(grasp)):
                yield from self._close(grasp)
                if (yield from self._carry(grasp)):
                    yield from self._let_go()
            self._tried += 1

    def _reach(self, grasp: Grasp) -> Generator[Vector, None, bool]:
        """Over everything on the way to a place above the grasp, then down. Returns whether it got there."""
        travel = self._travel_m(self._grip(grasp)[:2]) - TIPS_M
        while np.linalg.norm((self._grip(grasp) - self._hand())[:2]) > 0.03:
            goal, hand = self._grip(grasp), self._hand()
            high = hand[2] > travel - 0.02 or np.linalg.norm((goal - hand)[:2]) < 0.08
            over = goal[:2] if high else hand[:2]
            yield self._towards(np.array([*over, max(goal[2] + 0.05, travel)]), grasp.axis, _OPEN)
        lowest, stalled = np.inf, 0
        while stalled < _STALLED_STEPS:
            goal = self._grip(grasp)
            error = goal - self._hand()
            aside = float(np.linalg.norm(error[:2]))
            if aside < 0.006 and abs(error[2]) < 0.005 and abs(turn(self._scene.opening(), grasp.axis)) < 0.1:
                return True
            distance = float(np.linalg.norm(error))
            lowest, stalled = (distance, 0) if distance < lowest - 0.002 else (lowest, stalled + 1)
            height = goal[2] + 4.0 * max(aside - 0.008, 0.0)
            yield self._towards(np.array([*goal[:2], height]), grasp.axis, _OPEN)
        return aside < 0.01 and abs(error[2]) < 0.01

    def _close(self, grasp: Grasp) -> Iterator[Vector]:
        """Until the fingers come no nearer to one another."""
        at, apart, still = self._hand(), np.inf, 0
        while still < 3:
            yield self._towards(at, grasp.axis, _CLOSE)
            before, apart = apart, self._scene.apart()
            still = still + 1 if before - apart < 5e-4 else 0

    def _carry(self, grasp: Grasp) -> Generator[Vector, None, bool]:
        """Up, across and down to the goal. Returns whether the object is there."""
        start = self._place()[2]
        bottom = self._hand()[2] - float(self._scene.corners(self._name)[:, 2].min())  # how far it hangs down
        travel = self._travel_m(self._scene.place(self._target)[:2]) + bottom
        while self._hand()[2] < travel - 0.01:
            yield self._towards(np.array([*self._hand()[:2], travel]), grasp.axis, _CLOSE)
            if self._lost(start, bottom):
                return False
        release = self._release_m(bottom)
        while not self._lost(start, bottom):
            offset = (self._scene.place(self._target) - self._place())[:2]
            distance = float(np.linalg.norm(offset))
            if distance < 0.01 and self._hand()[2] < release + 0.008:
                return True
            height = min(release + 4.0 * max(distance - 0.015, 0.0), travel)
            yield self._towards(np.array([*(self._hand()[:2] + offset), height]), grasp.axis, _CLOSE)
        return False

    def _lost(self, start: float, bottom: float) -> bool:
        """It stayed behind when the hand went up, or fell."""
        hand, place = self._hand(), self._place()
        stayed = hand[2] > start + bottom + 0.05 and place[2] < start + 0.02
        return bool(stayed or np.linalg.norm(place - hand) > 0.13)

    def _let_go(self) -> Iterator[Vector]:
        axis = self._scene.opening()
        at = self._hand()
        for _ in range(_STEPS_TO_OPEN):
            yield self._towards(at, axis, _OPEN)
        for _ in range(30):
            yield self._towards(at + np.array([0.0, 0.0, 0.12]), axis, _OPEN)

    def _travel_m(self, goal: Vector) -> float:
        """The height above which nothing but the object is in the way from the hand to `goal`, [2]."""
        start, steps = self._hand()[:2], np.linspace(0.0, 1.0, 30)[:, None]
        path = start + steps * (goal - start)
        around = [path + np.array(aside) for aside in ((0, 0), (0.06, 0), (-0.06, 0), (0, 0.06), (0, -0.06))]
        tallest = float(self._scene.height(np.concatenate(around), without=self._name).max())
        return tallest + _CLEARANCE_M + self._higher_m

    def _release_m(self, bottom: float) -> float:
        """Height of the pads at which it is let go.

        Its bottom is then just above what it is put on, or the hand above the walls of what it is put into.
        """
        at = self._scene.place(self._target)[:2]
        ring = [at + 0.09 * np.array([np.cos(a), np.sin(a)]) for a in np.linspace(0, 2 * np.pi, 24)]
        if self._relation == "in":
            return float(self._scene.height(np.array(ring), without=self._name).max()) + 0.03
        return float(self._scene.height(at[None], without=self._name)[0]) + bottom + 0.012

    def _grip(self, grasp: Grasp) -> Vector:
        grip: Vector = self._place() + grasp.offset
        grip[:2] += self._jitter_m * directions(grasp.axis)[1]
        return grip

    def _place(self) -> Vector:
        return self._scene.place(self._name)

    def _hand(self) -> Vector:
        return self._scene.hand()

    def _towards(self, goal: Vector, axis: float, gripper: float) -> Vector:
        translation = np.clip((goal - self._hand()) * _GAIN_PER_M, -1.0, 1.0)
        rotation = np.clip(turn(self._scene.opening(), axis) * _GAIN_PER_RAD, -1.0, 1.0)
        return np.array([*translation, 0.0, 0.0, rotation, gripper])


def expert(simulator: Simulator, seed: int) -> PickAndPlaceExpert:
    """The expert of the episode of this seed, which `simulator` is at the start of.

    Raises:
        ValueError: the task wants something else than one object put somewhere.
    """
    return PickAndPlaceExpert(simulator, _rng(simulator, seed))


def _move_away(simulator: Simulator, rng: np.random.Generator, offset_m: float) -> None:
    """The open hand to a place beside or above where it is; never lower, where objects are."""
    scene = SceneGeometry(_standard_problem(simulator))
    goal = scene.hand() + rng.uniform([-offset_m, -offset_m, 0.0], offset_m)
    for _ in range(_STEPS_TO_MOVE_AWAY):
        motion = np.clip((goal - scene.hand()) * _GAIN_PER_M, -1.0, 1.0)
        simulator.step(np.array([*motion, 0.0, 0.0, 0.0, _OPEN]))


def _rng(simulator: Simulator, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(simulator.task.name.encode())])


def _standard_problem(simulator: Simulator) -> StandardProblem:
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
    showing, rng = showing or Showing(), _rng(simulator, seed)
    simulator.reset(seed)
    settle(simulator)
    if showing.start_offset_m:
        _move_away(simulator, rng, showing.start_offset_m)
    if lead is not None:
        lead(simulator, rng)
    solver = PickAndPlaceExpert(simulator, rng)
    assert isinstance(simulator, LiberoSimulator), "the expert checks this"
    return demonstration_of(solver, simulator, seed, DartNoise(rng, _NOISE_SHARE), showing.watch(simulator))
