"""The scene is lit otherwise: brightness, colour, direction, highlights, shadows.

LIBERO-Plus has scenes of its own for this (`_light_{n}`), which are a further download; here lights are drawn from
the ranges below. So these are the factors that it names, not its scenes, and numbers of the two are not the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ipvla.sim.perturbations.perturbation import Change, PerturbationConfig
from ipvla.sim.perturbations.scene import Scene

#: The point that lights are turned about, in metres.
_PIVOT_M: Final = np.array([0.0, 0.0, 0.8])
#: At full strength: factors of brightness; by which share a colour channel may gain or lose; degrees about the
#: vertical and off it (few, so that no wall stands between the scene and a light that casts shadows); highlight.
_DARKEST, _BRIGHTEST = 1 / 3, 1.6
_MOST_TINT: Final = 0.4
_MOST_ROUND_DEG: Final = 180.0
_MOST_TILT_DEG: Final = 15.0
_MOST_HIGHLIGHT: Final = 0.7


@dataclass(frozen=True)
class Lighting(Change):
    """Of every light, the camera's own included.

    Attributes:
        gain: factors of the brightness of red, green and blue.
        turn_rad: a rotation vector, about the middle of the scene.
        highlight: added to how brightly highlights shine, in [0, 1].
        shadow: the nearest light casts shadows, which LIBERO's do not.
    """

    gain: tuple[float, float, float]
    turn_rad: tuple[float, float, float]
    highlight: float
    shadow: bool

    @property
    def drawn(self) -> Mapping[str, Any]:
        return {
            "light_gain": [round(gain, 3) for gain in self.gain],
            "light_turn_rad": [round(angle, 3) for angle in self.turn_rad],
            "light_highlight": round(self.highlight, 3),
            "light_shadow": self.shadow,
        }

    def apply(self, scene: Scene) -> None:
        from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]  # takes a second

        model, turn = scene.model, Rotation.from_rotvec(self.turn_rad)
        for light in (scene.headlight.ambient, scene.headlight.diffuse, model.light_ambient, model.light_diffuse):
            light[:] = np.clip(light * np.array(self.gain), 0, None)
        model.light_specular[:] = np.clip(model.light_specular + self.highlight, 0, 1)
        model.light_pos[:] = turn.apply(model.light_pos - _PIVOT_M) + _PIVOT_M
        model.light_dir[:] = turn.apply(model.light_dir)
        if self.shadow:
            nearest = np.linalg.norm(model.light_pos - _PIVOT_M, axis=1).argmin()
            model.light_castshadow[nearest] = True
            scene.hide_gripper_marks()


@PerturbationConfig.register_subclass("light")
@dataclass(frozen=True)
class LightConfig(PerturbationConfig):
    """Lights of another brightness, colour and direction, with highlights and perhaps shadows."""

    def build(self, suite: str) -> LightConfig:
        """Draws for any suite."""
        return self

    def change(self, task: str, seed: int) -> Lighting:
        """Of an episode."""
        from scipy.spatial.transform import Rotation

        numbers = self.numbers(task, seed)
        strength = self.strength(numbers.random())
        brighter, side = numbers.random() < 0.5, numbers.choice([-1, 1])
        colour = numbers.standard_normal(3)
        colour -= colour.mean()
        colour /= np.abs(colour).max()
        gain = (_BRIGHTEST if brighter else _DARKEST) ** strength * (1 + _MOST_TINT * strength * colour)
        about = numbers.random() * 2 * np.pi
        tilt = np.array([np.cos(about), np.sin(about), 0]) * np.radians(_MOST_TILT_DEG) * strength
        vertical = np.array([0, 0, side]) * np.radians(_MOST_ROUND_DEG) * strength
        turn = Rotation.from_rotvec(tilt) * Rotation.from_rotvec(vertical)
        red, green, blue = gain.tolist()
        x, y, z = turn.as_rotvec().tolist()
        shadow = bool(numbers.random() < strength)
        return Lighting((red, green, blue), (x, y, z), _MOST_HIGHLIGHT * strength, shadow)
