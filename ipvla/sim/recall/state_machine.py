"""Decides a Recall episode: cues, lock, presses, flash, success and failure. No physics in here."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ipvla.sim.recall.tasks import RecallTask


@dataclass
class StateMachine:
    """An episode's progress, advanced once per control step by what the scene's sensors report.

    A press counts when a finger touches a button, and the next one only after the hand has been raised in
    between. The first wrong press fails the episode. A decided episode stays as it is.

    Attributes:
        task: the task being played.
        cues: indices of the objects that are shown, as in `Episode`; empty for tasks without a cue.
        cue_at: the control step at which they begin to be shown.
        t: control steps since the reset.
        pressed: buttons pressed so far, in order.
        armed: the hand has been raised since the last press.
        delivered: the object is where it should be (place).
    """

    task: RecallTask
    cues: tuple[int, ...] = ()
    cue_at: int = 0
    t: int = 0
    pressed: list[int] = field(default_factory=list)
    armed: bool = True
    delivered: bool = False
    _flash_until: int = 0

    @property
    def program(self) -> tuple[int, ...]:
        """The presses that solve this episode, in order where the order counts."""
        return self.cues or self.task.program

    @property
    def todo(self) -> tuple[int, ...]:
        """What is left of the program; none of it once the episode has failed."""
        if self.failure:
            return ()
        if self.task.ordered:
            return self.program[len(self.pressed) :]
        return tuple(button for button in self.program if button not in self.pressed)

    @property
    def progress(self) -> int:
        """How many presses of the program are done."""
        return 0 if self.failure else len(self.pressed)

    @property
    def success(self) -> bool:
        return not self.todo and not self.failure if self.program else self.delivered

    @property
    def failure(self) -> bool:
        deadline = self.task.deadline_steps
        if deadline and self.t > self.cue_at + deadline and len(self.pressed) < len(self.program):
            return True
        if self.task.ordered:
            return tuple(self.pressed) != self.program[: len(self.pressed)]
        return len(set(self.pressed)) < len(self.pressed) or not set(self.pressed) <= set(self.program)

    @property
    def locked(self) -> bool:
        """The arm does not obey yet, and the go-lamp is off."""
        return self.t < self.task.locked_steps

    @property
    def shown(self) -> tuple[int, ...]:
        """The cues that have been shown so far, those of now included."""
        since = self.t - self.cue_at
        if since < 0 or not self.cues:
            return ()
        if not self.task.ordered:
            return self.cues
        return self.cues[: 1 + since // (self.task.cue_steps + self.task.gap_steps)]

    @property
    def lit(self) -> tuple[int, ...]:
        """The objects that are shown now."""
        since = self.t - self.cue_at
        if not self.task.ordered:
            return self.shown if since < self.task.cue_steps else ()
        since -= (len(self.shown) - 1) * (self.task.cue_steps + self.task.gap_steps)
        return self.shown[-1:] if since < self.task.cue_steps else ()

    @property
    def flashing(self) -> int | None:
        """The button that acknowledges a press now."""
        return self.pressed[-1] if self.t < self._flash_until else None

    def advance(self, touched: int | None = None, raised: bool = False, delivered: bool = False) -> None:
        """One control step.

        Args:
            touched: index of the button that a finger touches, None for none.
            raised: the hand is well above the buttons.
            delivered: the object is where it should be.
        """
        self.t += 1
        if self.success or self.failure:
            return
        self.delivered = delivered
        if not self.program:
            return
        if touched is None:
            self.armed |= raised
        elif self.armed:
            self.pressed.append(touched)
            self.armed = False
            self._flash_until = self.t + self.task.flash_steps

    def to_array(self) -> npt.NDArray[np.float64]:
        """float64 [4 + presses]; `load_array` takes it back."""
        return np.array([self.t, self.armed, self.delivered, self._flash_until, *self.pressed], dtype=np.float64)

    def load_array(self, array: npt.NDArray[np.float64]) -> None:
        """Continues where `to_array` was called; task and cue stay as they are."""
        self.t, self._flash_until = int(array[0]), int(array[3])
        self.armed, self.delivered = bool(array[1]), bool(array[2])
        self.pressed = [int(button) for button in array[4:]]
