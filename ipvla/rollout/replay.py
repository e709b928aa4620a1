"""An episode played again from its recorded actions: the same steps, without the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ipvla.rollout.episode import EpisodeObserver
from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import EpisodeResult


class ReplayError(ValueError):
    """The recorded actions lead elsewhere here than where they were recorded."""


def replay_episode(
    simulator: Simulator,
    recorded: EpisodeResult,
    actions: npt.NDArray[np.float32],
    observers: Sequence[EpisodeObserver] = (),
) -> None:
    """Plays `actions`, [T, A], from the episode's seed, for observers to watch.

    Raises:
        ReplayError: the episode does not end as `recorded` (another version of the physics, another processor).
    """
    outcome, steps = StepOutcome(success=False, failure=False), 0
    simulator.reset(recorded.spec.seed)
    for observer in observers:
        observer.on_reset(simulator)
    for action in actions:
        outcome, steps = simulator.step(action), steps + 1
        for observer in observers:
            observer.on_step(simulator, action, outcome)
        if outcome.done:
            break
    if (outcome.verdict, steps) != (recorded.outcome, recorded.steps):
        raise ReplayError(
            f"{recorded.spec.key} ended as {recorded.outcome} after {recorded.steps} control steps, its actions "
            f"now lead to {outcome.verdict} after {steps}; replay it where it was played, with the same versions"
        )
