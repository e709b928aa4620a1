"""Decides an episode of LIBERO-Mem: sub-goals in their order, each counted once. No physics in here.

LIBERO-Mem's own evaluator (its `LIBERO_Kitchen_Tabletop_Manipulation`) counts a sub-goal when its relation holds
after it has been absent for more than `ABSENT_STEPS` control steps and present for more than `PRESENT_STEPS`, both
in all since the sub-goal before it: so a bowl that still stands where it stood does not count as put back. Of
several sequences (`Or`) those drop out that did not begin with what was reached. After the last sub-goal its
relation must last: where it is absent for more than `LOST_STEPS` in a row, the episode went too far and failed.

It leaves open how long it must last. Here `REST_STEPS`, which is longer than another lift takes: a policy that
does not know how often it has lifted the bowl, and lifts it again, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

#: (relation, object, where), in BDDL's words: ("on", "akita_black_bowl_1", "plate_1").
Goal = tuple[str, str, str]

ABSENT_STEPS: Final = 15
PRESENT_STEPS: Final = 5
LOST_STEPS: Final = 5
REST_STEPS: Final = 120


@dataclass
class SubgoalProgress:
    """An episode's progress, advanced once per control step.

    Attributes:
        sequences: the ways to solve the task, each a sequence of sub-goals; all equally long.
        reached: sub-goals so far.
        absent, present: control steps without and with the relation that is due, per sequence, since the last one.
        rested: control steps since the last sub-goal of all.
        lost: of them the last ones in a row in which its relation did not hold.
    """

    sequences: tuple[tuple[Goal, ...], ...]
    reached: int = 0
    absent: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    rested: int = 0
    lost: int = 0
    _way: int = 0

    def __post_init__(self) -> None:
        lengths = {len(sequence) for sequence in self.sequences}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(f"sequences of {sorted(lengths)} sub-goals; give one or more, equally long")
        self._start_counting()

    @property
    def possible(self) -> tuple[tuple[Goal, ...], ...]:
        """The sequences that begin with what was reached."""
        done = self.sequences[self._way][: self.reached]
        return tuple(sequence for sequence in self.sequences if sequence[: self.reached] == done)

    @property
    def subgoals(self) -> int:
        """How many there are in all."""
        return len(self.sequences[0])

    @property
    def completion(self) -> float:
        """Share of the sub-goals that were reached, in [0, 1]: the paper's measure."""
        return self.reached / self.subgoals

    @property
    def success(self) -> bool:
        return self.rested >= REST_STEPS and not self.failure

    @property
    def failure(self) -> bool:
        """The sequence was complete, and then undone."""
        return self.lost > LOST_STEPS

    def advance(self, holds: Callable[[Sequence[str]], bool]) -> None:
        """One control step; `holds` says whether a relation does now. A decided episode stays as it is."""
        if self.success or self.failure:
            return
        if self.reached == self.subgoals:
            self.rested += 1
            self.lost = 0 if holds(self.sequences[self._way][-1]) else self.lost + 1
            return
        for way, sequence in enumerate(self.sequences):
            if sequence not in self.possible:
                continue
            now = holds(sequence[self.reached])
            self.present[way] += now
            self.absent[way] += not now
            if now and self.absent[way] > ABSENT_STEPS and self.present[way] > PRESENT_STEPS:
                self._way, self.reached = way, self.reached + 1
                self._start_counting()
                return

    def to_array(self) -> npt.NDArray[np.float64]:
        """float64 [4 + 2 sequences]; `load_array` takes it back."""
        counts = [self.reached, self._way, self.rested, self.lost, *self.absent, *self.present]
        return np.array(counts, dtype=np.float64)

    def load_array(self, array: npt.NDArray[np.float64]) -> None:
        """Continues where `to_array` was called; the sequences stay as they are."""
        self.reached, self._way, self.rested, self.lost = (int(count) for count in array[:4])
        absent, present = np.split(array[4:].astype(int), 2)
        self.absent, self.present = absent.tolist(), present.tolist()

    def _start_counting(self) -> None:
        self.absent, self.present = [0] * len(self.sequences), [0] * len(self.sequences)
