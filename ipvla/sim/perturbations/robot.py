"""The arm starts elsewhere: its joints off the initial state's by a vector of random direction.

As LIBERO-Plus draws its robots (`_initstate_{n}`): a standard normal vector made as long as 0.1 rad for n up to
100, 0.2 rad up to 200, and so on to 0.5 rad. It is added to the initial state, before anything settles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ipvla.sim.perturbations.perturbation import Change, PerturbationConfig
from ipvla.sim.perturbations.scene import Scene

_RADIANS_PER_LEVEL: Final = 0.1
_JOINTS: Final = 7


@dataclass(frozen=True)
class Start(Change):
    """`offset_rad` of the arm's seven joints."""

    offset_rad: tuple[float, ...]

    @property
    def drawn(self) -> Mapping[str, Any]:
        return {"arm_offset_rad": [round(offset, 4) for offset in self.offset_rad]}

    def apply(self, scene: Scene) -> None:
        scene.move_arm(np.array(self.offset_rad))


@PerturbationConfig.register_subclass("robot")
@dataclass(frozen=True)
class RobotConfig(PerturbationConfig):
    """The arm's joints start off the initial state's by 0.1 rad per level, in a random direction."""

    def build(self, suite: str) -> RobotConfig:
        """Draws for any suite."""
        return self

    def change(self, task: str, seed: int) -> Start:
        """Of an episode."""
        direction = self.numbers(task, seed).standard_normal(_JOINTS)
        offset = direction / np.linalg.norm(direction) * _RADIANS_PER_LEVEL * self.level
        return Start(tuple(offset.tolist()))
