"""The scripted expert, which sees the true state, and its demonstrations: actions, plans and questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from ipvla.sim.altered_tasks import GOAL_SWAP
from ipvla.sim.demonstration import DartNoise, Demonstration, Showing, Vector, demonstration_of
from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.recall.episode import episode_rng
from ipvla.sim.recall.labels import draw, look, plan_text, questions
from ipvla.sim.recall.scene import BUTTON_HEIGHT_M, TABLE_TOP_M
from ipvla.sim.recall.tasks import RecallTask
from ipvla.sim.simulator import Simulator

if TYPE_CHECKING:
    from ipvla.sim.recall.problem import RecallProblem

#: How much noise demonstrations of a family bear.
_NOISE_SHARE = {
    "ground": 1.0,
    "recall": 1.0,
    "delay": 1.0,
    "items": 1.0,
    "order": 1.0,
    "cups": 1.0,
    "chase": 1.0,
    "glimpse": 1.0,
    "shuffle": 1.0,
    "count": 1.0,
    "place": 0.6,
    GOAL_SWAP: 1.0,
}

#: Action per metre of error: a full command from 2.5 cm on.
_GAIN_PER_M = 40.0
_OPEN, _CLOSE = -1.0, 1.0

#: A press aims below the top, so that the fingers surely touch it; in between they travel this far above it.
_PRESS_DEPTH_M = 0.02
_CLEARANCE_M = 0.10 - BUTTON_HEIGHT_M
_FUNNEL_RADIUS_M, _FUNNEL_SLOPE = 0.022, 3.0

#: Place: how far above the table the cube's centre travels, and where it is let go.
_CARRY_M = TABLE_TOP_M + 0.10
_RELEASE_M = TABLE_TOP_M + 0.08


class Expert:
    """Solves a Recall task from the true state, one action at a time.

    Args:
        simulator: of a Recall task, at the start of an episode.
        rng: where on a button to press, and how high to travel.

    Raises:
        ValueError: the task's family has no script.
    """

    def __init__(self, simulator: Simulator, rng: np.random.Generator) -> None:
        scripts = {family: self._place if family == "place" else self._press for family in _NOISE_SHARE}
        self._problem = _recall_problem(simulator)
        family = simulator.task.family
        if family not in scripts:
            raise ValueError(
                f"no expert for family {family!r} of task {simulator.task.name!r}; "
                f"choose a task of one of: {', '.join(scripts)}"
            )
        self._script = scripts[family]
        camera = self._problem.camera()
        self._cells = [camera.cell(self._problem.top_m(i)) for i in range(len(self._problem.task.objects))]
        self._spot_m = rng.normal(0.0, 0.006, size=2)
        self._clearance_m = _CLEARANCE_M + rng.uniform(-0.01, 0.015)
        self._phase = 0
        self._waited = 0

    def act(self) -> Vector:
        """float64 [7] in [-1, 1], the action for the state that the world is in now."""
        return self._script()

    def reason(self) -> str:
        """The plan in words, as of the observation of the state that the world is in now; see `plan_text`."""
        problem = self._problem
        return plan_text(problem.episode, problem.machine, self._cells, carried=problem.carried())

    def _press(self) -> Vector:
        machine = self._problem.machine
        hand = self._problem.fingertips_m()
        if machine.locked or (machine.cues and not machine.shown):
            return self._towards(hand, hand, _CLOSE)
        top = self._problem.top_m((machine.todo or machine.program)[0])
        travel = top[2] + self._clearance_m
        if machine.success or not machine.armed or machine.flashing is not None:
            # until the light is out: a policy that looks every few steps takes two quick presses for one
            return self._towards(hand, np.array([*hand[:2], travel]), _CLOSE)
        target = top[:2] + self._spot_m
        # A funnel over the button: no lower than its distance allows, so that the fingers come from above.
        distance = float(np.linalg.norm(target - hand[:2]))
        height = min(top[2] - _PRESS_DEPTH_M + _FUNNEL_SLOPE * max(distance - _FUNNEL_RADIUS_M, 0.0), travel)
        return self._towards(hand, np.array([*target, height]), _CLOSE)

    def _place(self) -> Vector:
        hand, cube, bowl = self._problem.fingertips_m(), self._problem.position_m(0), self._problem.position_m(1)
        return (self._reach, self._grasp, self._carry, self._drop)[self._phase](hand, cube, bowl)

    def _reach(self, hand: Vector, cube: Vector, bowl: Vector) -> Vector:
        distance = float(np.linalg.norm(cube[:2] - hand[:2]))
        if distance < 0.012 and hand[2] < cube[2] + 0.012:
            self._next(1)
        height = min(cube[2] + 4.0 * max(distance - 0.012, 0.0), TABLE_TOP_M + 0.10)
        return self._towards(hand, np.array([*cube[:2], height]), _OPEN)

    def _grasp(self, hand: Vector, cube: Vector, bowl: Vector) -> Vector:
        self._waited += 1
        if self._waited > 5:
            self._next(2)
        return self._towards(hand, np.array([*cube[:2], hand[2]]), _CLOSE)

    def _carry(self, hand: Vector, cube: Vector, bowl: Vector) -> Vector:
        offset = bowl[:2] - cube[:2]
        lifted = cube[2] > TABLE_TOP_M + 0.07
        if lifted and np.linalg.norm(offset) < 0.02:
            self._next(3)
        elif cube[2] < TABLE_TOP_M + 0.03 and hand[2] > TABLE_TOP_M + 0.07:
            self._next(0)  # the cube slipped
        goal = hand[:2] + offset if lifted else hand[:2]
        return self._towards(hand, np.array([*goal, _CARRY_M]), _CLOSE)

    def _drop(self, hand: Vector, cube: Vector, bowl: Vector) -> Vector:
        offset = bowl[:2] - cube[:2]
        held = np.linalg.norm(cube - hand) < 0.03
        if not held:
            if np.linalg.norm(offset) > 0.05 and cube[2] < TABLE_TOP_M + 0.03:
                self._next(0)  # it fell beside the bowl
            return self._towards(hand, np.array([*hand[:2], TABLE_TOP_M + 0.14]), _OPEN)
        self._waited += hand[2] < _RELEASE_M + 0.01
        gripper = _OPEN if self._waited and np.linalg.norm(offset) < 0.03 else _CLOSE
        return self._towards(hand, np.array([*(hand[:2] + offset), _RELEASE_M]), gripper)

    def _next(self, phase: int) -> None:
        self._phase, self._waited = phase, 0

    @staticmethod
    def _towards(hand: Vector, goal: Vector, gripper: float) -> Vector:
        translation = np.clip((goal - hand) * _GAIN_PER_M, -1.0, 1.0)
        return np.concatenate([translation, np.zeros(3), [gripper]])


def _recall_problem(simulator: Simulator) -> RecallProblem:
    if not isinstance(simulator, LiberoSimulator) or not isinstance(simulator.task, RecallTask):
        raise ValueError(f"no expert for task {simulator.task.name!r}; choose a task of the suite 'recall'")
    return cast("RecallProblem", simulator.problem)


def expert(simulator: Simulator, seed: int) -> Expert:
    """The expert of the episode of this seed, which `simulator` is at the start of.

    Raises:
        ValueError: the task's family has no script.
    """
    return Expert(simulator, episode_rng(_recall_problem(simulator).task, seed, "expert"))


def demonstrate(simulator: Simulator, seed: int, showing: Showing | None = None) -> Demonstration | None:
    """One attempt of the expert at the episode of this seed; the same for the same task, seed and camera size.

    Returns:
        The demonstration, or None when the attempt failed or took longer than the task's horizon.

    Raises:
        ValueError: the task's family has no script, or the hand is to begin elsewhere.
    """
    showing = showing or Showing()
    if showing.start_offset_m:
        raise ValueError(f"start_offset_m is {showing.start_offset_m}; Recall has one place for the hand: give 0")
    problem = _recall_problem(simulator)
    task = problem.task
    rng, asking = (episode_rng(task, seed, purpose) for purpose in ("expert", "questions"))
    simulator.reset(seed)
    expert = Expert(simulator, rng)
    assert isinstance(simulator, LiberoSimulator), "it has Recall's problem"

    def describe() -> tuple[str, str, str]:
        asked = draw(questions(look(problem)), asking)
        return expert.reason(), asked.text if asked else "", asked.answer if asked else ""

    noise = DartNoise(rng, _NOISE_SHARE[task.family])
    return demonstration_of(expert, simulator, seed, noise, showing.watch(simulator), describe)
