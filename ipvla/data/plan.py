"""Which step of which episode each lane sees in each window of an epoch: a pure function of its arguments."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Lanes that some of an epoch was played on.

    Attributes:
        lanes: of all workers together.
        windows: played on them.
    """

    lanes: int
    windows: int


@dataclass(frozen=True)
class PlanPosition:
    """The window that comes next: all that a checkpoint needs to resume the data.

    Attributes:
        window: of the present layout.
        before: layouts that this epoch was played on until the number of lanes changed, in order.
    """

    epoch: int = 0
    window: int = 0
    before: tuple[Layout, ...] = ()

    def next(self, num_windows: int) -> PlanPosition:
        """One window on, into the next epoch after the last of this plan's `num_windows`."""
        if self.window + 1 >= num_windows:
            return PlanPosition(self.epoch + 1)
        return replace(self, window=self.window + 1)

    def on_other_lanes(self, lanes: int) -> PlanPosition:
        """The same place on another number of lanes; `lanes` is the number up to now."""
        if not self.window:
            return self
        return PlanPosition(self.epoch, 0, (*self.before, Layout(lanes, self.window)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanPosition:
        """The inverse of `dataclasses.asdict`."""
        before = tuple(Layout(**layout) for layout in values.get("before", ()))
        return cls(values["epoch"], values["window"], before)


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

    Where the number of lanes changed within the epoch, what is left is laid onto the new ones. An episode that was
    under way goes on first on the lane of its number, where its memory is; if that lane is gone, it goes on
    elsewhere from the same step, as if it began there (`restarted`).

    Args:
        lengths: int64 [E], control steps per episode, each >= 1.
        seed, epoch: non-negative; key everything random.
        lanes_total: lanes of all workers together.
        window: K, policy steps per window.
        stride: control steps per policy step.
        offsets: first control steps to draw from, at most `stride`; None for `stride`.
        grid: sampled steps are multiples of it, which the stride is too.
        before: the layouts that some of the epoch was played on already.
        repeats: int64 [E], how often each episode is seen, each time from an offset of its own; None for once.

    Attributes:
        num_windows: that are left of this epoch; 0 if nothing is.
        idle_share: fraction of all (lane, step) places without an episode; they all lie at the lanes' ends.
        restarted: episodes under way that had to go on without their memory.
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
        before: Sequence[Layout] = (),
        repeats: IntArray | None = None,
        grid: int = 1,
    ) -> None:
        self._episode = np.arange(len(lengths)) if repeats is None else np.repeat(np.arange(len(lengths)), repeats)
        lengths = lengths[self._episode]
        if not len(lengths) or lengths.min() < 1:
            raise ValueError("a plan needs at least one episode, and every episode at least one step")
        rng = np.random.default_rng((seed, epoch))
        rank = rng.permutation(len(lengths))
        offset = (rng.random(len(lengths)) * np.minimum(lengths, offsets or stride)).astype(np.int64)
        offset -= offset % grid
        left = _Parts(
            episode=np.arange(len(lengths)),
            first=np.zeros(len(lengths), np.int64),
            steps=-(-(lengths - offset) // stride),
            lane=np.full(len(lengths), -1),
        )
        for layout in before:
            left = left.on(layout.lanes, rank).after(layout.windows * window)
        self.restarted = int(((left.first > 0) & (left.lane >= lanes_total)).sum())
        parts = left.on(lanes_total, rank)
        longest = int(parts.end.max()) if len(parts.steps) else 0
        self.num_windows = -(-longest // window)
        places = lanes_total * self.num_windows * window
        self.idle_share = float(1 - parts.steps.sum() / places) if places else 0.0
        self._window, self._stride = window, stride
        # Lanes are laid end to end on one axis, so that one binary search finds the episodes of a whole window.
        self._lane_start = np.arange(lanes_total) * self.num_windows * window
        self._parts = parts
        self._offset = offset
        self._start = self._lane_start[parts.lane] + parts.start

    def window(self, index: int) -> WindowPlan:
        """Window `index` of all lanes; ValueError outside [0, num_windows)."""
        if not 0 <= index < self.num_windows:
            raise ValueError(
                f"window {index} is outside this epoch's {self.num_windows}; "
                "resume with the dataset, number of lanes, window and stride of the checkpoint"
            )
        place = self._lane_start[:, None] + index * self._window + np.arange(self._window)
        # A lane that never plays anything lies before the first part, or behind another lane's last one.
        which = np.maximum(np.searchsorted(self._start, place, side="right") - 1, 0)
        step = place - self._start[which]
        parts = self._parts
        active = (step >= 0) & (step < parts.steps[which])
        seen = parts.episode[which]
        t = self._offset[seen] + (parts.first[which] + step) * self._stride
        return WindowPlan(
            episode=np.where(active, self._episode[seen], -1),
            t=np.where(active, t, 0),
            is_first=active & (step == 0) & ~parts.goes_on[which],
        )


@dataclass(frozen=True)
class _Parts:
    """What is left of episodes, each int64 [N]: from sampled step `first` on `steps` more.

    `lane` is where they were under way, else -1; once laid out it is where they go on, with `start`, their
    place on it, and `goes_on`, whether they have their memory there.
    """

    episode: IntArray
    first: IntArray
    steps: IntArray
    lane: IntArray
    start: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    goes_on: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def end(self) -> IntArray:
        return self.start + self.steps

    def on(self, lanes: int, rank: IntArray) -> _Parts:
        """In the order of the lanes and on each of them of play."""
        goes_on = (self.lane >= 0) & (self.lane < lanes)
        lane = _schedule(self.steps, rank[self.episode], np.where(goes_on, self.lane, -1), lanes)
        order = np.lexsort((rank[self.episode], ~goes_on, lane))
        steps, lane = self.steps[order], lane[order]
        per_lane = np.bincount(lane, weights=steps, minlength=lanes).astype(np.int64)
        start = np.cumsum(steps) - steps - (np.cumsum(per_lane) - per_lane)[lane]
        return _Parts(self.episode[order], self.first[order], steps, lane, start, goes_on[order])

    def after(self, played: int) -> _Parts:
        """What is left once every lane has played so many places."""
        done = np.clip(played - self.start, 0, self.steps)
        left = done < self.steps
        lane = np.where(done > 0, self.lane, -1)
        return _Parts(self.episode[left], (self.first + done)[left], (self.steps - done)[left], lane[left])


def _schedule(steps: IntArray, rank: IntArray, fixed: IntArray, lanes_total: int) -> IntArray:
    """Lane of each part, int64 [N]: `fixed` where that is one, else the longest first onto the lane with least."""
    lanes = fixed.copy()
    taken = fixed >= 0
    busy = np.bincount(fixed[taken], weights=steps[taken], minlength=lanes_total).astype(np.int64)
    loads = list(zip(busy.tolist(), range(lanes_total), strict=True))
    heapq.heapify(loads)
    free = np.nonzero(~taken)[0]
    for part in free[np.lexsort((rank[free], -steps[free]))].tolist():
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + int(steps[part]), lane))
        lanes[part] = lane
    return lanes
