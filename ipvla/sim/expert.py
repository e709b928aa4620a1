"""Scripted experts: their common interface."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

#: Noise levels of demonstrations; an episode draws one.
NOISE_LEVELS: Final = (0.0, 0.3, 0.6)
_NOISE_DECAY: Final = 0.7


class Expert(Protocol):
    """Solves one episode, which it sees as it truly is."""

    def act(self) -> Vector:
        """float64 [A] (LIBERO's hand: [7] in [-1, 1]), the action for the state that the world is in now."""


class DartNoise:
    """Smooth noise on the motion that is played, never on the actions that are recorded.

    Demonstrations then show how to come back from where a learner will stray (DART, Laskey et al. 2017,
    arXiv:1703.09327).

    Args:
        rng: of the episode.
        share: scales the level that the episode draws from `NOISE_LEVELS`.
    """

    def __init__(self, rng: np.random.Generator, share: float) -> None:
        self._rng, self._level, self._now = rng, float(rng.choice(NOISE_LEVELS)) * share, np.zeros(3)

    def disturb(self, action: Vector) -> Vector:
        """What is played instead of the next action, [7]."""
        self._now = _NOISE_DECAY * self._now + self._rng.normal(0.0, 0.7 * self._level, size=3)
        played = action.copy()
        played[:3] = np.clip(played[:3] + self._now, -1.0, 1.0)
        return played
