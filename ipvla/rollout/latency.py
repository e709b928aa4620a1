"""A world that does not wait: how late an answer is, and what is played meanwhile."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from ipvla.choices import did_you_mean
from ipvla.contract import Contract
from ipvla.types import Observation

#: "hold": the robot keeps still; "rest": it plays what is left of the last chunk, and then keeps still.
MEANWHILE: Final = ("hold", "rest")
#: Kinds of action of which it is known what keeps a robot still.
_HOLDABLE: Final = ("hand", "joints")
#: The gripper's number before any action was played: open, as robots and LIBERO's protocols begin.
_OPEN: Final = {"environment": -1.0, "open_is_one": 1.0, "none": 0.0}


@dataclass(frozen=True)
class Latency:
    """How long answers take, in control steps.

    Attributes:
        steps: one number for every call; or several, measured ones, of which every call of an episode draws one.
        meanwhile: what is played until an answer is there, see `MEANWHILE`.
    """

    steps: tuple[int, ...] = (0,)
    meanwhile: str = "hold"

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("success.latency_steps is empty; give a number of control steps, 0 for none")
        if min(self.steps) < 0:
            raise ValueError(f"success.latency_steps is {min(self.steps)}; give control steps, 0 or more")
        if self.meanwhile not in MEANWHILE:
            raise ValueError(
                f"success.meanwhile: {self.meanwhile!r} is unknown; {did_you_mean(self.meanwhile, MEANWHILE)}"
            )

    @classmethod
    def of(cls, steps: int | tuple[int, ...], meanwhile: str) -> Self:
        """From settings, where one number stands for itself."""
        return cls((steps,) if isinstance(steps, int) else tuple(steps), meanwhile)

    @property
    def longest(self) -> int:
        """In control steps, 0 for a world that waits."""
        return max(self.steps)

    def drawn(self, episode: str, call: int) -> int:
        """Of this call, counted from 0, of an episode (an `EpisodeSpec.key`): the same in every attempt."""
        if len(self.steps) == 1:
            return self.steps[0]
        drawn = hashlib.sha256(f"{episode}\0latency\0{call}".encode()).digest()
        return self.steps[int.from_bytes(drawn[:8], "big") % len(self.steps)]

    def __str__(self) -> str:
        """What a result says of it; empty for a world that waits, whatever would be played meanwhile."""
        return f"{' '.join(map(str, self.steps))}, {self.meanwhile}" if self.longest else ""


def require_hold(terms: Contract | None) -> None:
    """ValueError unless it is known what keeps a robot still that is moved on these terms."""
    kind = None if terms is None else terms.action
    if kind not in _HOLDABLE:
        raise ValueError(
            "success.latency_steps: nothing tells what keeps a robot still whose actions are "
            f"{kind or 'unknown'!r}; state `action: {_HOLDABLE[0]}` or `{_HOLDABLE[1]}` in the suite's terms"
        )


def hold_action(
    terms: Contract, observation: Observation, last: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """The action that keeps the robot still, float32 [A] on the policy's terms.

    A motion of the hand is 0, and its gripper stays as it was told last. Joint positions stay those that were told
    last; before any they are the ones observed, where the state is as long as an action.

    Args:
        last: the action that was played last, [A]; None at an episode's start.

    Raises:
        ValueError: nothing tells what keeps this robot still.
    """
    require_hold(terms)
    if terms.action == "joints":
        if last is not None:
            return last
        if len(observation.proprio) != terms.action_size:
            raise ValueError(
                f"success.latency_steps: actions are {terms.action_size} joint positions and the state has "
                f"{len(observation.proprio)} numbers: nothing tells where the robot is before it moves"
            )
        return observation.proprio.astype(np.float32)
    still = np.zeros(terms.action_size, np.float32)
    if terms.gripper != "none":
        still[-1] = _OPEN[terms.gripper] if last is None else last[-1]
    return still
