"""Videos of episodes: an observer that collects small frames and writes them as mp4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ipvla.files import replacing
from ipvla.sim.simulator import Simulator, StepOutcome

_CONTROL_HZ = 20


class VideoRecorder:
    """Renders every `every`-th control step, and the last one, at `size` x `size` pixels.

    Args:
        size: a multiple of 16 (the encoder's block).
        every: control steps per frame.
    """

    def __init__(self, size: int = 128, every: int = 2) -> None:
        if size < 16 or size % 16:
            raise ValueError(f"video size {size} is not a positive multiple of 16 pixels; use e.g. 128")
        if every < 1:
            raise ValueError(f"a frame every {every} control steps is not possible; use every >= 1")
        self._size, self._every = size, every
        self._steps = 0
        self.frames: list[npt.NDArray[np.uint8]] = []

    def on_reset(self, simulator: Simulator) -> None:
        self._steps, self.frames = 0, [simulator.frame(self._size)]

    def on_step(self, simulator: Simulator, action: npt.NDArray[np.float32], outcome: StepOutcome) -> None:
        self._steps += 1
        if self._steps % self._every == 0 or outcome.done:
            self.frames.append(simulator.frame(self._size))

    def save(self, path: Path) -> Path:
        """Writes the mp4 at real-time speed; the file appears whole or not at all."""
        import imageio_ffmpeg

        with replacing(path) as part:
            writer = imageio_ffmpeg.write_frames(
                str(part),
                (self._size, self._size),
                fps=_CONTROL_HZ / self._every,
                ffmpeg_log_level="error",
                output_params=["-f", "mp4"],
            )
            writer.send(None)
            for frame in self.frames:
                writer.send(np.ascontiguousarray(frame))
            writer.close()
        return path
