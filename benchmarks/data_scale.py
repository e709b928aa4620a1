"""What an epoch of a large collection asks of storage and workers: from measured constants and a real plan."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from ipvla.data.plan import EpochPlan

#: Of every worker: lanes, policy steps per window, control steps per policy step.
_LANES, _WINDOW, _STRIDE = 16, 8, 4
#: Windows that are prefetched, pictures decoded.
_PREFETCHED = 2


@dataclass(frozen=True)
class Collection:
    """Episodes of log-normal length.

    Attributes:
        episodes: how many.
        median_steps, spread: of the lengths; the spread is the standard deviation of their logarithm.
        cameras: pictures per step.
        pixels: side of a picture.
    """

    episodes: int
    median_steps: float
    spread: float
    cameras: int
    pixels: int


#: About Open X-Embodiment as OpenVLA takes it: a million episodes, most of some tens of steps, some of hundreds.
OXE: Final = Collection(episodes=1_000_000, median_steps=60, spread=0.8, cameras=2, pixels=256)


@dataclass(frozen=True)
class Constants:
    """What was measured on this machine, of pictures of the benchmark's size.

    Attributes:
        bytes_per_picture: encoded, with all else in a record.
        cpu_s_per_picture: to read and decode it.
        pixels: side of the pictures that these are of.
    """

    bytes_per_picture: float
    cpu_s_per_picture: float
    pixels: int

    def of(self, pixels: int) -> tuple[float, float]:
        """Both for pictures of another side, in proportion to their area."""
        area = (pixels / self.pixels) ** 2
        return self.bytes_per_picture * area, self.cpu_s_per_picture * area


@dataclass(frozen=True)
class Scale:
    """One epoch by so many workers.

    Attributes:
        workers: of 16 lanes each.
        terabytes: read from storage, every episode once.
        requests: ranged reads, one per episode.
        worker_mb: encoded episodes on a worker's lanes, each as long as one in a hundred is, and decoded windows
            ahead.
        cpu_hours: of reading and decoding, all workers together; one step in `stride` is decoded.
        windows: training steps in the epoch.
        idle_share: of all places in lanes, simulated; they lie at the lanes' ends, and there is no other padding.
        planning_s: CPU seconds in which each worker makes the plan.
    """

    workers: int
    terabytes: float
    requests: int
    worker_mb: float
    cpu_hours: float
    windows: int
    idle_share: float
    planning_s: float


def at_scale(collection: Collection, constants: Constants, workers: int, rng: np.random.Generator) -> Scale:
    """Plans a real epoch of that size."""
    drawn = rng.lognormal(np.log(collection.median_steps), collection.spread, collection.episodes)
    lengths = np.maximum(drawn.astype(np.int64), 1)
    started = time.process_time()
    plan = EpochPlan(lengths, 0, 0, lanes_total=workers * _LANES, window=_WINDOW, stride=_STRIDE)
    planning_s = time.process_time() - started
    size, cpu_s = constants.of(collection.pixels)
    pictures = int(lengths.sum()) * collection.cameras
    encoded = _LANES * float(np.quantile(lengths, 0.99)) * collection.cameras * size
    decoded = _PREFETCHED * _LANES * _WINDOW * collection.cameras * 3 * collection.pixels**2
    return Scale(
        workers,
        terabytes=pictures * size / 1e12,
        requests=collection.episodes,
        worker_mb=(encoded + decoded) / 1e6,
        cpu_hours=pictures / _STRIDE * cpu_s / 3600,
        windows=plan.num_windows,
        idle_share=plan.idle_share,
        planning_s=planning_s,
    )
