"""The progress of a running evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from evaluators.intervals import wilson_interval
from ipvla.types import EpisodeResult


class RolloutStatus:
    """Counts the episodes of one policy as they end.

    Args:
        total: episodes to play; fewer are played if the evaluation stops early.
        recorded: results of earlier starts.
        clock: seconds.
    """

    def __init__(
        self, total: int, recorded: Iterable[EpisodeResult] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        before = list(recorded)
        self.total, self.played, self.new = total, len(before), 0
        self.successes = sum(result.success for result in before)
        #: Failed attempts of the episodes that this start played.
        self.retries = 0
        #: Share of the time that a policy replica works, in [0, 1]; None while unknown.
        self.policy_busy: float | None = None
        self.last: EpisodeResult | None = None
        self._clock, self._began_s = clock, clock()
        self._heard_s = self._ended_s = self._began_s
        self._forward_s = 0.0
        self._wall_s, self._waited_s = 0.0, 0.0

    def add(self, result: EpisodeResult) -> None:
        """An episode has ended."""
        self.last, self.played, self.new = result, self.played + 1, self.new + 1
        self.successes += result.success
        self.retries += result.spec.attempt
        self._ended_s = self._clock()
        self._wall_s += result.wall_s
        self._waited_s += result.policy_s

    def hear(self, stats: Mapping[str, float], replicas: int) -> None:
        """Takes the current `PolicyService.stats`; the policy's load is measured since the last call."""
        now, forward_s = self._clock(), stats.get("forward_s", 0.0)
        if now > self._heard_s and forward_s >= self._forward_s:  # a replica that died took its count along
            self.policy_busy = min((forward_s - self._forward_s) / (now - self._heard_s) / replicas, 1.0)
        self._heard_s, self._forward_s = now, forward_s

    @property
    def unheard_s(self) -> float:
        """Since `hear` was last called."""
        return self._clock() - self._heard_s

    @property
    def success95(self) -> tuple[float, float]:
        """Wilson's interval of the success rate so far; (0, 1) before the first episode."""
        return wilson_interval(self.successes, self.played) if self.played else (0.0, 1.0)

    @property
    def waiting(self) -> float:
        """Share of the simulators' time in which they wait for the policy, in [0, 1]."""
        return self._waited_s / self._wall_s if self._wall_s else 0.0

    @property
    def episodes_per_s(self) -> float:
        """From the evaluation's beginning to the last episode that ended."""
        return self.new / (self._ended_s - self._began_s) if self._ended_s > self._began_s else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until all are played; None while that is unknown."""
        return (self.total - self.played) / self.episodes_per_s if self.episodes_per_s else None
