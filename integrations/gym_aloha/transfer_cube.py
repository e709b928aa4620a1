"""Who solves gym-aloha's transfer of the cube: the hands' path by waypoints, the joints by inverse kinematics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from dm_control.mujoco.wrapper.mjbindings import mjlib

Vector = npt.NDArray[np.float64]
Side = Literal["left", "right"]

#: From the hand's body to between the finger tips, along its own x axis, in metres.
_REACH_M: Final = 0.13
#: How far the right hand leans down, so that the left one has room beside it, in radians.
_LEANING: Final = 1.05
_OPEN, _CLOSED = 1.0, 0.0
_MEET: Final = np.array([0.0, 0.5, 0.25])
_ITERATIONS, _DAMPING, _TURN_M = 80, 1e-2, 0.1
_ARM_JOINTS: Final = 6
#: Where an arm's joints begin in `qpos`, and in an action.
_QPOS: Final[dict[Side, int]] = {"left": 0, "right": 8}
_ACTION: Final[dict[Side, int]] = {"left": 0, "right": 7}


@dataclass(frozen=True)
class Hand:
    """Where a hand shall be: finger tips (m), leaning down and rolled (rad), the gripper 0 closed to 1 open."""

    tips: Vector
    leaning: float = 0.0
    roll: float = 0.0
    gripper: float = _OPEN


class TransferCube:
    """The right hand lifts the cube to the middle, the left one takes it from the side.

    Arms hang below where they are sent, so every goal is corrected by how far they missed the one before.

    Args:
        environment: of `integrations.gym_aloha`, at the start of an episode.
        rng: varies where the hands meet, and how fast they are.
    """

    def __init__(self, environment: Any, rng: np.random.Generator) -> None:
        self._physics, self._thought = environment.physics, environment.physics.copy(share_model=True)
        self._meet = _MEET + rng.uniform(-0.02, 0.02, 3)
        self._pace = float(rng.uniform(0.9, 1.15))
        self._action = np.concatenate([np.append(self._arm(side), _CLOSED) for side in ("left", "right")])
        self._missed = {"left": np.zeros(3), "right": np.zeros(3)}
        self._script = self._solve()

    def act(self) -> Vector:
        """float64 [14], the joints of the left arm, its gripper, and those of the right one."""
        return next(self._script)

    def _solve(self) -> Iterator[Vector]:
        right = Hand(_beside(self._cube(), [0.0, 0.0, 0.08]), _LEANING)
        left = Hand(_beside(self._meet, [-0.18, 0.0, 0.0]), roll=np.pi / 2)
        yield from self._move(55, right=right)
        right = replace(right, tips=_beside(self._cube(), [0.0, 0.0, 0.005]))
        yield from self._move(25, right=right)
        yield from self._move(12, right=right)
        right = replace(right, gripper=_CLOSED)
        yield from self._move(15, right=right)
        yield from self._move(60, right=replace(right, tips=self._meet), left=left)
        yield from self._move(10, left=left)
        left = replace(left, tips=_beside(self._cube(), [-0.005, 0.0, 0.0]))
        yield from self._move(35, left=left)
        yield from self._move(10, left=left)
        left = replace(left, gripper=_CLOSED)
        yield from self._move(20, left=left)
        yield from self._move(12, right=replace(right, tips=self._meet, gripper=_OPEN))
        apart = replace(right, tips=_beside(self._meet, [0.1, 0.0, 0.06]), gripper=_OPEN)
        yield from self._move(30, right=apart, left=replace(left, tips=_beside(left.tips, [-0.06, 0.0, 0.0])))
        while True:
            yield self._action

    def _move(self, steps: int, **hands: Hand) -> Iterator[Vector]:
        """Both arms to their goals, in straight lines of their joints."""
        begin, goal = self._action, self._action.copy()
        for side, hand in hands.items():
            first = _ACTION[side]  # type: ignore[index]
            goal[first : first + 7] = [*self._joints(side, hand), hand.gripper]  # type: ignore[arg-type]
        count = max(1, round(steps * self._pace))
        for share in np.arange(1, count + 1) / count:
            self._action = begin + share * (goal - begin)
            yield self._action
        for side, hand in hands.items():
            body = self._physics.model.name2id(f"vx300s_{side}/gripper_link", "body")
            self._missed[side] += 0.8 * (hand.tips - _tips(self._physics.data, body))

    def _joints(self, side: Side, hand: Hand) -> Vector:
        """The arm's joints, float64 [6], that put the finger tips there, by damped least squares."""
        model, data = self._thought.model, self._thought.data
        body, first = model.name2id(f"vx300s_{side}/gripper_link", "body"), _QPOS[side]
        columns = slice(first, first + _ARM_JOINTS)
        wanted, goal = _axes(side, hand), hand.tips + self._missed[side]
        joints = self._action[_ACTION[side] : _ACTION[side] + _ARM_JOINTS].copy()
        along, turning = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        for _ in range(_ITERATIONS):
            data.qpos[columns] = joints
            mjlib.mj_kinematics(model.ptr, data.ptr)
            mjlib.mj_comPos(model.ptr, data.ptr)
            turned, tips = data.xmat[body].reshape(3, 3), _tips(data, body)
            mjlib.mj_jac(model.ptr, data.ptr, along, turning, tips, body)
            jacobian = np.concatenate([along[:, columns], _TURN_M * turning[:, columns]])
            aside = 0.5 * np.cross(turned, wanted, axis=0).sum(axis=1)
            error = np.concatenate([goal - tips, _TURN_M * aside])
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPING**2 * np.eye(6), error)
            low, high = model.jnt_range[columns].T
            joints = np.clip(joints + np.clip(step, -0.2, 0.2), low, high)
        return joints

    def _arm(self, side: Side) -> Vector:
        joints: Vector = self._physics.data.qpos[_QPOS[side] : _QPOS[side] + _ARM_JOINTS]
        return joints

    def _cube(self) -> Vector:
        place: Vector = self._physics.named.data.xpos["box"].copy()
        return place


def expert(environment: Any, rng: np.random.Generator) -> TransferCube:
    """The expert of the episode that `environment` is at the start of."""
    return TransferCube(environment, rng)


def _beside(place: Vector, offset_m: list[float]) -> Vector:
    beside: Vector = place + np.array(offset_m)
    return beside


def _tips(data: Any, body: int) -> Vector:
    """Between the finger tips of the hand with this body, in metres."""
    tips: Vector = data.xpos[body] + data.xmat[body].reshape(3, 3)[:, 0] * _REACH_M
    return tips


def _axes(side: Side, hand: Hand) -> Vector:
    """The hand's axes as columns: x to the tips, y along which the fingers open."""
    forward = 1.0 if side == "left" else -1.0
    c, s = np.cos(hand.leaning), np.sin(hand.leaning)
    level = np.array([[forward * c, 0.0, forward * s], [0.0, forward, 0.0], [-s, 0.0, c]])
    c, s = np.cos(hand.roll), np.sin(hand.roll)
    turned: Vector = level @ np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
    return turned
