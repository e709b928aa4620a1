"""Random shifts and light of training pictures, the same for all of an episode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ipvla.data.plan import IntArray


@dataclass(frozen=True)
class AugmentationConfig:
    """How training pictures vary; rollouts see them as they are.

    Attributes:
        shift_px: up to so many pixels left, right, up and down, edges repeated (random shift, Yarats et al., arXiv
            2004.13649); drawn per episode, epoch and view.
        brightness: factor 1 - b to 1 + b on all pixels of a view, drawn likewise.
    """

    shift_px: int = 0
    brightness: float = 0.0

    def __post_init__(self) -> None:
        if self.shift_px < 0:
            raise ValueError(f"data.augmentation.shift_px is {self.shift_px}; give pixels, 0 or more")
        if not 0 <= self.brightness < 1:
            raise ValueError(f"data.augmentation.brightness is {self.brightness}; it must be in [0, 1)")

    def apply(self, images: npt.NDArray[np.uint8], key: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Pictures of one episode, uint8 [N, V, H, W, 3], varied as (seed, epoch, episode) says; a new array."""
        rng = np.random.default_rng(key)
        varied = np.empty_like(images)
        for view in range(images.shape[1]):
            dy, dx = rng.integers(-self.shift_px, self.shift_px + 1, 2)
            gain = 1 + self.brightness * rng.uniform(-1, 1)
            height, width = images.shape[2:4]
            rows = np.clip(np.arange(height) + dy, 0, height - 1)
            columns = np.clip(np.arange(width) + dx, 0, width - 1)
            shifted = images[:, view][:, rows][:, :, columns]
            varied[:, view] = shifted if gain == 1 else np.clip(shifted * np.float32(gain), 0, 255)
        return varied

    def batch(
        self, images: npt.NDArray[np.uint8], episodes: IntArray, seed: int, epoch: int
    ) -> npt.NDArray[np.uint8]:
        """Pictures uint8 [N, V, H, W, 3] of episodes int64 [N], -1 where idle."""
        varied = images.copy()
        for episode in np.unique(episodes[episodes >= 0]).tolist():
            of_it = episodes == episode
            varied[of_it] = self.apply(images[of_it], (seed, epoch, episode))
        return varied
