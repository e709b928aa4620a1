"""Is a scene still what its task says, once it has come to rest?

Objects of the published initial states begin in the air and fall into their places. With another version of the
physics they may fall otherwise: from MuJoCo 3.4 on, a bowl "on the ramekin" is not. Nobody would notice from
success rates alone.

Import only after `ipvla.sim.libero.configure`, e.g. once a simulator is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Simulator, Split, StepOutcome
from ipvla.sim.standard.problem import StandardProblem

_SETTLING: Final = load_protocol("openvla")
#: An object that has come to lie further than this beside the place above which it began has slid or rolled away.
_ASIDE_M: Final = 0.1


@dataclass(frozen=True)
class Violation:
    """What is wrong with one initial state of a task."""

    task: str
    trial: int
    what: str

    def __str__(self) -> str:
        return f"{self.task}, initial state {self.trial}: {self.what}"


def settle(simulator: Simulator) -> StepOutcome:
    """Plays the settling steps of the "openvla" protocol."""
    outcome = StepOutcome(success=False, failure=False)
    for _ in range(_SETTLING.settle_steps):
        outcome = simulator.step(np.array(_SETTLING.settle_action))
    return outcome


def violations(simulator: Simulator, trial: int) -> Iterator[Violation]:
    """Of one published initial state, after the settling steps of the "openvla" protocol.

    Raises:
        ValueError: the simulator is not one of LIBERO's own suites, or has no such state.
    """
    problem, task = getattr(simulator, "problem", None), simulator.task.name
    if not isinstance(problem, StandardProblem):
        raise ValueError(f"{task} is not of LIBERO's own suites; only these have published initial states")
    simulator.reset(Split.HELD_OUT.seed(trial))
    began = problem.positions_m()
    outcome = settle(simulator)
    if outcome.success:
        yield Violation(task, trial, "the goal is reached before anybody has done anything")
    for relation, holds in problem.premises().items():
        if not holds:
            yield Violation(task, trial, f"({relation}) does not hold")
    for name, now in problem.positions_m().items():
        aside = float(np.linalg.norm(now[:2] - began[name][:2]))
        if aside > _ASIDE_M:
            yield Violation(task, trial, f"{name} came to rest {100 * aside:.0f} cm aside")
