"""A suite from outside: a world of another kind, its expert, its facts, and one line that registers it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipvla.contract import Contract
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.demonstration import Demonstration
from ipvla.sim.simulator import Task
from ipvla.sim.suite import Suite, SuiteEntry, SuiteFacts
from ipvla.sim.suites import SUITES
from ipvla.types import Observation
from tests.rollout.point import HORIZON, PointSimulator

TASKS = tuple(Task(f"go_{i}", "go", ("go",), HORIZON, chance=1 / 3) for i in range(2))
FACTS = SuiteFacts(
    contract=Contract(
        ("agentview",), gripper="none", action="other", action_size=1, state="other", state_size=2, control_hz=10.0
    ),
    has_expert=True,
    packages={"point": "numpy"},
    environment=lambda: {"POINT_WORLD": "1"},
)


class Pictured(PointSimulator):
    """The point world, seen."""

    def observe(self, geometry: bool = False) -> Observation:
        seen = super().observe()
        return Observation({"agentview": self.frame(16)}, seen.proprio, seen.instruction, seen.t)


@dataclass(frozen=True)
class Walker:
    """Goes where the cue points."""

    simulator: Pictured

    def act(self):
        return np.array([self.simulator.cue], np.float64)


def demonstrate(simulator, seed, showing=None):
    simulator.reset(seed)
    states, actions, pictures, done = [], [], [], False
    while not done and len(actions) < HORIZON:
        seen = simulator.observe()
        states.append(seen.proprio)
        pictures.append(seen.images["agentview"])
        actions.append(Walker(simulator).act().astype(np.float32))
        outcome = simulator.step(actions[-1])
        done = outcome.done
    if not outcome.success:
        return None
    images = {"agentview": np.stack(pictures)}
    return Demonstration(simulator.task.name, "go", "go", seed, images, np.stack(states), np.stack(actions))


def load(cache_dir: Path) -> Suite:
    return Suite(
        "outside",
        "1",
        TASKS,
        lambda name, *_: Pictured(name),
        expert=lambda simulator, seed: Walker(simulator),
        demonstrate=demonstrate,
        facts=FACTS,
    )


ENTRY = SuiteEntry("outside", load, lambda: TASKS, FACTS)


class Simulators(SuiteSimulators):
    """Those of any suite; they add the line in a simulator's process, where no test has."""

    def __call__(self, suite, task):
        SUITES["outside"] = ENTRY
        return super().__call__(suite, task)
