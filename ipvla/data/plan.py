"""Which step of which episode each lane sees in each window of an epoch: a pure function of its arguments."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanPosition:
    """The window that comes next: all that a checkpoint needs to resume the data."""

    epoch: int = 0
    window: int = 0

    def next(self, num_windows: int) -> PlanPosition:
        """One window on, into the next epoch after the last of this epoch's `num_windows`."""
        last = self.window + 1 >= num_windows
        return PlanPosition(self.epoch + 1, 0) if last else PlanPosition(self.epoch, self.window + 1)


@dataclass(frozen=True)
class WindowPlan:
    """One window of all lanes.

    Attributes:
        episode: int64 [lanes, K], -1 where the lane is idle.
        t: int64 [lanes, K], control step since the reset, 0 where idle.
        is_first: bool [lanes, K], True on an episode's first sampled step.
    """

    episode: IntArray
    t: IntArray
    is_first: npt.NDArray[np.bool_]

    def lanes(self, first: int, stop: int) -> WindowPlan:
        """The window of lanes [first, stop) alone."""
        return WindowPlan(self.episode[first:stop], self.t[first:stop], self.is_first[first:stop])


class EpochPlan:
    """One epoch: every lane plays whole episodes, one after another, and windows of K policy steps cut its stream.

    An episode is sampled every `stride` control steps from an offset in [0, offsets) that is drawn for this epoch
    and episode, so that with `offsets` = `stride` every control step is seen over the epochs. Offsets and thus the
    sampled steps depend on (lengths, seed, epoch, stride, offsets) only, not on the number of lanes.

    Args:
        lengths: int64 [E], control steps per episode, each >= 1.
        seed, epoch: non-negative; key everything random.
        lanes_total: lanes of all workers together.
        window: K, policy steps per window.
        stride: control steps per policy step.
        offsets: first control steps to draw from, at most `stride`; None for `stride`.

    Attributes:
        num_windows: in this epoch.
        idle_share: fraction of all (lane, step) places without an episode; they all lie at the lanes' ends.
    """

    def __init__(
        self,
        lengths: IntArray,
        seed: int,
        epoch: int,
        *,
        lanes_total: int,
        window: int,
        stride: int,
        offsets: int | None = None,
    ) -> None:
        if not len(lengths) or lengths.min() < 1:
            raise ValueError("a plan needs at least one episode, and every episode at least one step")
        rng = np.random.default_rng((seed, epoch))
        rank = rng.permutation(len(lengths))
        offset = (rng.random(len(lengths)) * np.minimum(lengths, offsets or stride)).astype(np.int64)
        steps = -(-(lengths - offset) // stride)
        lane = _schedule(steps, rank, lanes_total)
        per_lane = np.bincount(lane, weights=steps, minlength=lanes_total).astype(np.int64)

        self.num_windows = int(-(-per_lane.max() // window))
        self.idle_share = float(1 - steps.sum() / (lanes_total * self.num_windows * window))
        self._lanes_total, self._window, self._stride = lanes_total, window, stride
        # Lanes are laid end to end on one axis, so that one binary search finds the episodes of a whole window.
        self._lane_start = np.arange(lanes_total) * self.num_windows * window
        self._episode = np.lexsort((rank, lane))
        self._steps, self._offset = steps[self._episode], offset[self._episode]
        before = np.cumsum(self._steps) - self._steps
        lane_before = np.cumsum(per_lane) - per_lane
        in_order = lane[self._episode]
        self._start = self._lane_start[in_order] + before - lane_before[in_order]

    def window(self, index: int) -> WindowPlan:
        """Window `index` of all lanes; ValueError outside [0, num_windows)."""
        if not 0 <= index < self.num_windows:
            raise ValueError(
                f"window {index} is outside this epoch's {self.num_windows}; "
                "resume with the dataset, number of lanes, window and stride of the checkpoint"
            )
        place = self._lane_start[:, None] + index * self._window + np.arange(self._window)
        which = np.searchsorted(self._start, place, side="right") - 1
        step = place - self._start[which]
        active = step < self._steps[which]
        return WindowPlan(
            episode=np.where(active, self._episode[which], -1),
            t=np.where(active, self._offset[which] + step * self._stride, 0),
            is_first=step == 0,
        )


def _schedule(steps: IntArray, rank: IntArray, lanes_total: int) -> IntArray:
    """Lane of each episode, int64 [E]: the longest first, each onto the lane with least to do."""
    loads = [(0, lane) for lane in range(lanes_total)]
    lanes = np.empty(len(steps), np.int64)
    for episode in np.lexsort((rank, -steps)).tolist():
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + int(steps[episode]), lane))
        lanes[episode] = lane
    return lanes
