"""The camera stands elsewhere: round the scene, higher, further away, or it looks aside.

As in LIBERO-Plus' names `_view_{round}_{up}_{scale}_{turn}_{tilt}`: degrees about the vertical through the
world's origin, degrees up about the point (0, 0, 0.8) m, per cent of the distance to that point, then degrees of
the camera alone about the world's vertical and its y axis. Exactly one of four kinds is drawn, as in its lists:
round by up to 75 degrees; the same from 15 degrees higher; up to 200 % of the distance; turned and tilted by up to
10 degrees. On the floor scenes of libero_object the camera stands below that point and sinks as it goes away: from
about 150 % the hand begins above the picture, as it does there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipvla.sim.perturbations.perturbation import Change, PerturbationConfig
from ipvla.sim.perturbations.scene import Scene

CAMERA: Final = "agentview"
_PIVOT_M: Final = np.array([0.0, 0.0, 0.8])
_MOST_ROUND, _UP, _MOST_FURTHER, _STEP_ASIDE = 75, 15, 100, 2


@dataclass(frozen=True)
class View(Change):
    """Where the camera stands: whole degrees, and per cent of its distance."""

    round: int = 0
    up: int = 0
    scale: int = 100
    turn: int = 0
    tilt: int = 0

    @property
    def drawn(self) -> Mapping[str, Any]:
        degrees = (self.round % 360, self.up, self.scale, self.turn % 360, self.tilt % 360)
        return {"view": "_".join(map(str, degrees))}

    def apply(self, scene: Scene) -> None:
        row, model = scene.camera(CAMERA), scene.model
        model.cam_pos[row], model.cam_quat[row] = self.pose(model.cam_pos[row], model.cam_quat[row])

    def pose(
        self, position: npt.NDArray[np.float64], quaternion: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Position [3] in metres and orientation [4] as w, x, y, z, of a camera that stands at these."""
        from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]  # takes a second

        def about(axis: str, degrees: float) -> Rotation:
            return Rotation.from_euler(axis, degrees, degrees=True)

        up, around = about("y", -self.up), about("z", self.round)
        alone = about("y", -self.tilt) * about("z", self.turn)
        moved = around.apply(up.apply(position - _PIVOT_M)) * self.scale / 100 + _PIVOT_M
        turned = alone * around * up * Rotation.from_quat(quaternion, scalar_first=True)
        return moved, turned.as_quat(scalar_first=True)


@PerturbationConfig.register_subclass("camera")
@dataclass(frozen=True)
class CameraConfig(PerturbationConfig):
    """The agent's camera stands elsewhere; a level is a fifth of each published range."""

    def build(self, suite: str) -> CameraConfig:
        """Draws for any suite."""
        return self

    def change(self, task: str, seed: int) -> View:
        """Of an episode."""
        numbers = self.numbers(task, seed)
        kind, share = numbers.integers(4), numbers.random()
        sides = numbers.choice([-1, 1], size=2)
        lesser, swapped = numbers.random(), numbers.random() < 0.5
        if kind < 2:
            degrees = math.ceil(self.strength(share) * _MOST_ROUND)
            return View(round=int(sides[0]) * degrees, up=_UP if kind else 0)
        if kind == 2:
            return View(scale=100 + math.ceil(self.strength(share) * _MOST_FURTHER))
        aside = (_STEP_ASIDE * self.level, _STEP_ASIDE * max(1, math.ceil(lesser * self.level)))
        turn, tilt = sides * (aside[::-1] if swapped else aside)
        return View(turn=int(turn), tilt=int(tilt))
