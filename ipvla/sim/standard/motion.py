"""Pick and place from the true state, one action at a time: what the scripted experts are made of.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Final

import numpy as np

from ipvla.sim.demonstration import Vector
from ipvla.sim.standard.geometry import SceneGeometry
from ipvla.sim.standard.grasp import TIPS_M, Grasp, directions, plan_grasp, turn

#: Action per metre and per radian of error.
GAIN_PER_M: Final = 30.0
_GAIN_PER_RAD = 4.0
OPEN: Final = -1.0
_CLOSE = 1.0

_CLEARANCE_M: Final = 0.04
_STEPS_TO_OPEN: Final = 4
_STEPS_AWAY: Final = 30
#: Putting down gently: how far below itself the hand aims, and how far below the place to let go it does not go.
_GENTLY_M, _LOWEST_M = 0.008, 0.04
#: Of what is taken at a rim far from its centre: how far it may move from the hand before it counts as fallen.
_NEAR_M, _SLACK_M = 0.13, 0.05
#: How near to its place the hand is when the fingers begin to close, aside and above.
_CLOSE_M: Final = (0.006, 0.005)
#: How near to its place an object is let go, aside and above. No nearer than needed: a policy that learns from
#: pictures stops a centimetre or two away, and would hold it there if the expert never let go so far from it.
_LET_GO_M: Final = {"in": (0.03, 0.03), "on": (0.01, 0.008)}
#: Steps without coming nearer after which something is in the way: of the open hand, and of what it carries.
_STALLED_STEPS: Final = 12
_BLOCKED_STEPS: Final = 40


class PickAndPlace:
    """Moves one object of a scene after another.

    Args:
        scene: the one that is acted in.
        rng: varies where it grasps and how high it travels.
        home: the direction in which the fingers open when the hand has not turned yet, in radians: it then turns
            no further than a quarter from there, and stays upright. None for the shortest way to the next grasp,
            with whatever tilt comes of it; with one grasp after another that ends at the joints' limits.
    """

    def __init__(self, scene: SceneGeometry, rng: np.random.Generator, home: float | None = None) -> None:
        self._scene, self._home = scene, home
        self._jitter_m = float(rng.normal(0.0, 0.002))
        self._higher_m = float(rng.uniform(0.0, 0.02))
        self._relation, self._name, self._target = "", "", ""
        self._tried, self._reach_m = 0, _NEAR_M

    def put(
        self,
        relation: str,
        name: str,
        target: str,
        lifted: Callable[[], bool] = lambda: True,
        steps_away: int = _STEPS_AWAY,
    ) -> Iterator[Vector]:
        """Actions, [7] each, until the object lies on ("on") or in ("in") the target and the hand is above it.

        It begins again, with another grasp, when one fails or the object slips.

        Args:
            lifted: what it waits for with the object up in the air.
            steps_away: control steps in which the hand goes up afterwards.
        """
        self._relation, self._name, self._target = relation, name, target
        there = False
        while not there:
            goal = self._scene.place(target)[:2] if self._gently else None
            grasp = plan_grasp(self._scene, name, self._tried, goal)
            if (yield from self._reach(grasp)):
                yield from self._close(grasp)
                there = yield from self._carry(grasp, lifted)
                if there:
                    yield from self._let_go(grasp, steps_away)
            self._tried += 1

    def rest(self) -> Vector:
        """The action, [7], that leaves the open hand where it is."""
        return np.array([*np.zeros(6), OPEN])

    def _reach(self, grasp: Grasp) -> Generator[Vector, None, bool]:
        """Over everything on the way to a place above the grasp, then down. Returns whether it got there."""
        travel = self._travel_m(self._grip(grasp)[:2]) - TIPS_M
        while np.linalg.norm((self._grip(grasp) - self._hand())[:2]) > 0.03:
            goal, hand = self._grip(grasp), self._hand()
            high = hand[2] > travel - 0.02 or np.linalg.norm((goal - hand)[:2]) < 0.08
            over = goal[:2] if high else hand[:2]
            yield self._towards(np.array([*over, max(goal[2] + 0.05, travel)]), grasp.axis, OPEN)
        (beside_m, above_m), (lowest, stalled) = np.array(_CLOSE_M) + grasp.slack_m, (np.inf, 0)
        while stalled < _STALLED_STEPS:
            goal = self._grip(grasp)
            error = goal - self._hand()
            aside = float(np.linalg.norm(error[:2]))
            if aside < beside_m and abs(error[2]) < above_m and abs(self._turn(grasp.axis)) < 0.1:
                return True
            distance = float(np.linalg.norm(error))
            lowest, stalled = (distance, 0) if distance < lowest - 0.002 else (lowest, stalled + 1)
            height = goal[2] + 4.0 * max(aside - max(beside_m, 0.008), 0.0)
            yield self._towards(np.array([*goal[:2], height]), grasp.axis, OPEN)
        return aside < 0.01 and abs(error[2]) < 0.01

    def _close(self, grasp: Grasp) -> Iterator[Vector]:
        """Until the fingers come no nearer to one another; on the way to the very place where that is allowed."""
        at, apart, still = self._hand(), np.inf, 0
        while still < 3:
            yield self._towards(self._grip(grasp) if grasp.slack_m else at, grasp.axis, _CLOSE)
            before, apart = apart, self._scene.apart()
            still = still + 1 if before - apart < 5e-4 else 0

    def _carry(self, grasp: Grasp, lifted: Callable[[], bool]) -> Generator[Vector, None, bool]:
        """Up, across and down to the goal. Returns whether the object is there."""
        start = self._place()[2]
        self._reach_m = max(_NEAR_M, float(np.linalg.norm(self._place() - self._hand())) + _SLACK_M)
        bottom = self._hand()[2] - float(self._scene.corners(self._name)[:, 2].min())  # how far it hangs down
        travel = self._travel_m(self._scene.place(self._target)[:2]) + bottom
        while self._hand()[2] < travel - 0.01:
            yield self._towards(np.array([*self._hand()[:2], travel]), grasp.axis, _CLOSE)
            if self._lost(start, bottom):
                return False
        while not lifted():
            yield self._towards(np.array([*self._hand()[:2], travel]), grasp.axis, _CLOSE)
            if self._lost(start, bottom):
                return False
        release, (beside_m, above_m) = self._release_m(bottom), _LET_GO_M[self._relation]
        nearest, stalled = np.inf, 0
        while not self._lost(start, bottom) and stalled < _BLOCKED_STEPS:
            offset = (self._scene.place(self._target) - self._place())[:2]
            distance = float(np.linalg.norm(offset))
            low = distance < beside_m and self._hand()[2] < release + above_m
            if low and (not self._gently or self._stands(release)):
                return True
            to_go = distance + abs(float(self._hand()[2]) - release)
            nearest, stalled = (to_go, 0) if to_go < nearest - 0.002 or low else (nearest, stalled + 1)
            height = min(release + 4.0 * max(distance - 0.015, 0.0), travel)
            if low:
                height = self._hand()[2] - _GENTLY_M
            yield self._towards(np.array([*(self._hand()[:2] + offset), height]), grasp.axis, _CLOSE)
        if stalled == _BLOCKED_STEPS:
            yield from self._let_go(grasp, _STEPS_AWAY)
        return False

    @property
    def _gently(self) -> bool:
        """It is not dropped but lowered until it touches what it is put on: a bottle would fall over."""
        return self._home is not None and self._relation == "on" and self._scene.is_object(self._target)

    def _stands(self, release: float) -> bool:
        touches = self._scene.touching(self._name, self._target)
        return touches or self._hand()[2] < release - _LOWEST_M

    def _lost(self, start: float, bottom: float) -> bool:
        """It stayed behind when the hand went up, or fell."""
        hand, place = self._hand(), self._place()
        stayed = hand[2] > start + bottom + 0.05 and place[2] < start + 0.02
        return bool(stayed or np.linalg.norm(place - hand) > self._reach_m)

    def _let_go(self, grasp: Grasp, steps_away: int) -> Iterator[Vector]:
        axis = self._scene.opening() if self._home is None else grasp.axis  # which is within a quarter from home
        at = self._hand()
        for _ in range(_STEPS_TO_OPEN):
            yield self._towards(at, axis, OPEN)
        for _ in range(steps_away):
            yield self._towards(at + np.array([0.0, 0.0, 0.12]), axis, OPEN)

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
        translation = np.clip((goal - self._hand()) * GAIN_PER_M, -1.0, 1.0)
        rotation = np.array([*self._upright(), self._turn(axis)])
        return np.array([*translation, *np.clip(rotation * _GAIN_PER_RAD, -1.0, 1.0), gripper])

    def _turn(self, axis: float) -> float:
        """By how much the hand turns about the vertical, in radians."""
        now = self._scene.opening()
        if self._home is None:
            return turn(now, axis)
        to = self._home + turn(self._home, axis) - now
        return (to + np.pi) % (2 * np.pi) - np.pi

    def _upright(self) -> Vector:
        """float64 [2], the rotation about x and y that takes its tilt away, in radians."""
        if self._home is None:
            return np.zeros(2)
        x, y, _ = self._scene.pointing()
        return np.array([-y, x])
