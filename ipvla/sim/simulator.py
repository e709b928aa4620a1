"""The Simulator protocol: one task's world, stepped without rendering and looked at only on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ipvla.types import Observation

_HELD_OUT_OFFSET = 2**31


class Split(Enum):
    """Train and held-out layouts. Their seeds are disjoint by construction: [0, 2^31) and [2^31, 2^32)."""

    TRAIN = 0
    HELD_OUT = _HELD_OUT_OFFSET

    def seed(self, index: int) -> int:
        """The simulator seed of this split's `index`-th layout, 0 <= index < 2^31."""
        if not 0 <= index < _HELD_OUT_OFFSET:
            raise ValueError(f"layout index {index} is outside [0, 2^31); pick a smaller non-negative index")
        return self.value + index


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        name: unique within the suite, e.g. `count_red2_blue1`.
        family: the group that results are reported by.
        phrasings: ways to say it; an episode's seed picks one.
        horizon: control steps until an episode counts as timed out.
        chance: success probability of a policy that acts well but ignores what the family tests, in [0, 1].
    """

    name: str
    family: str
    phrasings: tuple[str, ...]
    horizon: int
    chance: float


@dataclass(frozen=True)
class StepOutcome:
    """After one control step: did the task's state machine decide?"""

    success: bool
    failure: bool

    @property
    def done(self) -> bool:
        return self.success or self.failure

    @property
    def verdict(self) -> str:
        """Of an episode that ends here: "success", "failure", or "timeout" if nothing was decided."""
        return "success" if self.success else "failure" if self.failure else "timeout"


class Simulator(Protocol):
    """One task's world. `step` never renders; `observe` renders what it returns and nothing else.

    With `geometry` it also gives the geometry of the pictures; a world without depth raises ValueError then.

    The same seed gives the same episode after any other in this simulator.
    """

    task: Task

    @property
    def t(self) -> int:
        """Control steps since the reset."""

    def reset(self, seed: int) -> None: ...
    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome: ...
    def observe(self, geometry: bool = False) -> Observation: ...
    def joints(self) -> npt.NDArray[np.float32]: ...
    def frame(self, size: int = 256) -> npt.NDArray[np.uint8]: ...
    def state(self) -> Mapping[str, npt.NDArray[np.float64]]: ...
    def restore(self, state: Mapping[str, npt.NDArray[np.float64]]) -> None: ...
    def details(self) -> Mapping[str, Any]: ...
    def close(self) -> None: ...
