"""The agent's camera has a bad sensor: motion blur, Gaussian blur, zoom blur, fog or frosted glass.

Corruptions in the manner of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), with the ten severities each
that LIBERO-Plus has (`_noise_{k}`: 1 to 10 motion, to 20 Gaussian, to 30 zoom, to 40 fog, to 50 glass). An episode
has one of them; what it draws at random it draws anew at every control step, from the episode and the step.
Lengths are for pictures of 256 pixels, and follow the size of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipvla.sim.perturbations.camera import CAMERA
from ipvla.sim.perturbations.perturbation import Change, PerturbationConfig

#: float32 [S, S, 3] in [0, 1].
Pixels = npt.NDArray[np.float32]

_SIZE_PX: Final = 256
_SEVERITIES: Final = 10
#: By severity: reach and standard deviation of the blur, in pixels.
_MOTION: Final = (
    *((5, 2), (8, 3), (10, 4), (12, 5), (15, 6)),
    *((18, 8), (20, 10), (25, 12), (30, 15), (35, 20)),
)
#: Largest zoom, and the step to it.
_ZOOM: Final = (
    *((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.25, 0.02), (1.30, 0.03)),
    *((1.35, 0.01), (1.40, 0.01), (1.45, 0.02), (1.50, 0.02), (1.55, 0.03)),
)
#: Thickness, and by what the fog's structure weakens from one scale to half of it.
_FOG: Final = (
    *((0.5, 3.0), (1.0, 2.8), (1.5, 2.5), (2.0, 2.2), (2.5, 2.0)),
    *((3.0, 1.8), (3.5, 1.6), (4.0, 1.5), (4.5, 1.4), (5.0, 1.3)),
)
#: Blur in pixels, how far pixels stray, and how often.
_GLASS: Final = (
    *((0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2)),
    *((1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1)),
)
_MOST_MOTION_DEG: Final = 45.0


def motion_blur(pixels: Pixels, severity: int, numbers: np.random.Generator) -> Pixels:
    """Smeared to one side, within 45 degrees of the horizontal."""
    import cv2

    reach, deviation = (length * len(pixels) / _SIZE_PX for length in _MOTION[severity - 1])
    angle = np.radians(numbers.uniform(-_MOST_MOTION_DEG, _MOST_MOTION_DEG))
    along = np.arange(0, 2 * reach + 1, 0.5)
    weights = np.exp(-(along**2) / (2 * deviation**2))
    half = int(np.ceil(along[-1])) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    x, y = half + along * np.cos(angle), half + along * np.sin(angle)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for dx in (0, 1):  # each point is shared by the four pixels around it
        for dy in (0, 1):
            share = np.abs(1 - dx - (x - left)) * np.abs(1 - dy - (y - top))
            np.add.at(kernel, (top + dy, left + dx), weights * share)
    return _pixels(cv2.filter2D(pixels, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE))


def gaussian_blur(pixels: Pixels, severity: int, numbers: np.random.Generator) -> Pixels:
    """Out of focus, by as many pixels as the severity."""
    return _blurred(pixels, severity * len(pixels) / _SIZE_PX)


def zoom_blur(pixels: Pixels, severity: int, numbers: np.random.Generator) -> Pixels:
    """The mean of the picture and its enlargements about the centre."""
    import cv2

    most, step = _ZOOM[severity - 1]
    centre, size = (len(pixels) - 1) / 2, (len(pixels), len(pixels))
    total = pixels.copy()
    zooms = np.arange(1, most + step / 2, step)
    for zoom in zooms:
        shift = (1 - zoom) * centre
        enlarge = np.array([[zoom, 0, shift], [0, zoom, shift]])
        total += cv2.warpAffine(pixels, enlarge, size, borderMode=cv2.BORDER_REPLICATE)
    return _pixels(total / (len(zooms) + 1))


def fog(pixels: Pixels, severity: int, numbers: np.random.Generator) -> Pixels:
    """White haze of random structure on all scales; the brightest pixel stays as bright."""
    thickness, decay = _FOG[severity - 1]
    brightest = pixels.max()
    haze = thickness * _structure(len(pixels), decay, numbers)[..., None]
    return _pixels((pixels + haze) * brightest / (brightest + thickness))


def glass_blur(pixels: Pixels, severity: int, numbers: np.random.Generator) -> Pixels:
    """Blurred, pixels strayed among their neighbours, and blurred again."""
    import cv2

    deviation, stray, times = _GLASS[severity - 1]
    size, scale = len(pixels), len(pixels) / _SIZE_PX
    pixels = _blurred(pixels, deviation * scale)
    rows, columns = np.indices((size, size))
    for _ in range(times):
        down, right = numbers.integers(-stray, stray + 1, size=(2, size, size)) * scale
        x, y = _pixels(columns + right), _pixels(rows + down)
        pixels = _pixels(cv2.remap(pixels, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    return _blurred(pixels, deviation * scale)


#: In the order of LIBERO-Plus' numbers.
CORRUPTIONS: Final[Mapping[str, Callable[[Pixels, int, np.random.Generator], Pixels]]] = {
    "motion_blur": motion_blur,
    "gaussian_blur": gaussian_blur,
    "zoom_blur": zoom_blur,
    "fog": fog,
    "glass_blur": glass_blur,
}


@dataclass(frozen=True)
class Sensor(Change):
    """A corruption by name, its severity from 1 to 10, and the seeds of its random numbers, before the step's."""

    corruption: str
    severity: int
    seeds: tuple[int, ...]

    @property
    def drawn(self) -> Mapping[str, Any]:
        return {"noise": list(CORRUPTIONS).index(self.corruption) * _SEVERITIES + self.severity}

    def picture(self, picture: npt.NDArray[np.uint8], camera: str, t: int) -> npt.NDArray[np.uint8]:
        if camera != CAMERA:
            return picture
        numbers = np.random.default_rng([*self.seeds, t])
        seen = CORRUPTIONS[self.corruption](_pixels(picture) / np.float32(255), self.severity, numbers)
        return np.asarray(np.clip(seen * 255, 0, 255).round(), np.uint8)


@PerturbationConfig.register_subclass("noise")
@dataclass(frozen=True)
class NoiseConfig(PerturbationConfig):
    """The agent's pictures are corrupted; level 1 has severities 1 and 2 of ten, level 5 has 9 and 10."""

    def build(self, suite: str) -> NoiseConfig:
        """Draws for any suite."""
        return self

    def change(self, task: str, seed: int) -> Sensor:
        """Of an episode."""
        numbers = self.numbers(task, seed)
        corruption = list(CORRUPTIONS)[numbers.integers(len(CORRUPTIONS))]
        severity = 2 * self.level - int(numbers.integers(2))
        return Sensor(corruption, severity, tuple(numbers.integers(2**32, size=2).tolist()))


def _blurred(pixels: Pixels, deviation: float) -> Pixels:
    import cv2

    return _pixels(cv2.GaussianBlur(pixels, (0, 0), deviation, borderType=cv2.BORDER_REPLICATE))


def _structure(size: int, decay: float, numbers: np.random.Generator) -> Pixels:
    """float32 [S, S] in [0, 1]: random values on grids of 2, 4, 8, ... cells, each weaker by decay squared."""
    import cv2

    total, cells, weight = np.zeros((size, size), np.float32), 2, 1.0
    while cells <= 2 * size:
        grid = numbers.uniform(-weight, weight, size=(cells + 1, cells + 1)).astype(np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR)
        cells, weight = cells * 2, weight / decay**2
    total -= total.min()
    return _pixels(total / total.max())


def _pixels(values: Any) -> Pixels:
    return np.asarray(values, np.float32)
