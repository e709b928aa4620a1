"""A task of LIBERO-Mem: LIBERO's kitchen, played as its own suites are, decided by sub-goals in their order.

Import only after `ipvla.sim.libero.configure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.sim.libero_mem.progress import SubgoalProgress
from ipvla.sim.libero_mem.tasks import SequenceTask
from ipvla.sim.simulator import StepOutcome
from ipvla.sim.standard.problem import StandardProblem


class SequenceProblem(StandardProblem):
    """Every episode begins in a layout drawn from its seed, since no initial states are published.

    Args:
        bddl_file: of `bddl_text(task)`.
        task: the same task as data; it also has the sub-goals, which LIBERO's BDDL cannot say.
        profile, world_seed: as in `StandardProblem`.
    """

    def __init__(self, bddl_file: Path, task: SequenceTask, profile: str = "exact", world_seed: int = 0) -> None:
        super().__init__(bddl_file, task, None, profile, world_seed)
        self._sequences = task.sequences
        self.progress = SubgoalProgress(self._sequences)

    def begin(self, seed: int) -> None:
        super().begin(seed)
        self.progress = SubgoalProgress(self._sequences)

    def outcome(self) -> StepOutcome:
        return StepOutcome(success=self.progress.success, failure=self.progress.failure)

    def episode_array(self) -> npt.NDArray[np.float64]:
        progress = self.progress.to_array()
        return np.concatenate([super().episode_array(), progress])

    def load_episode_array(self, array: npt.NDArray[np.float64]) -> None:
        numbers = len(self.progress.to_array())
        super().load_episode_array(array[:-numbers])
        self.progress.load_array(array[-numbers:])

    def details(self) -> Mapping[str, Any]:
        progress = self.progress
        return {**super().details(), "subgoals_reached": progress.reached, "subgoals": progress.subgoals}

    def _judge(self) -> None:
        self.progress.advance(self.env._eval_predicate)
