"""Decides a Recall episode: cue, lock, presses, flash, success and failure. No physics in here."""

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
        cue: index of the button that lights up, None for tasks without a cue.
        t: control steps since the reset.
        pressed: buttons pressed so far, in order.
        armed: the hand has been raised since the last press.
        delivered: the object is where it should be (place).
    """

    task: RecallTask
    cue: int | None = None
    t: int = 0
    pressed: list[int] = field(default_factory=list)
    armed: bool = True
    delivered: bool = False
    _flash_until: int = 0

    @property
    def program(self) -> tuple[int, ...]:
        """The presses that solve this episode, in order."""
        return self.task.program if self.cue is None else (self.cue,)

    @property
    def progress(self) -> int:
        """How many presses of the program are done."""
        return 0 if self.failure else len(self.pressed)

    @property
    def success(self) -> bool:
        return tuple(self.pressed) == self.program if self.program else self.delivered

    @property
    def failure(self) -> bool:
        return tuple(self.pressed) != self.program[: len(self.pressed)]

    @property
    def locked(self) -> bool:
        """The arm does not obey yet, and the go-lamp is off."""
        return self.t < self.task.locked_steps

    @property
    def lit(self) -> int | None:
        """The button that shows the cue now."""
        return self.cue if self.t < self.task.cue_steps else None

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
