"""On paper: what a cluster of simulators and GPUs would give, by what was measured here or published elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from benchmarks.rollout_scaling import best_rate
from benchmarks.rollout_stub import EXECUTE, ForwardTime

#: pi0 on an RTX 4090 (Black et al. 2024, appendix on inference): 14 + 32 ms for pictures and prompt, 27 ms for ten
#: steps of the action expert. Assumed here: every row of a batch pays the former, a batch the latter.
PI0: Final = ForwardTime(0.027, 0.046)
#: Two pictures of 224 px as they are, and what goes with them.
_ANSWER_MB: Final = 0.31
_EPISODE_CHUNKS: Final = 27.5  # 220 control steps, libero_spatial's horizon


@dataclass(frozen=True)
class Limits:
    """Answers per second (8 control steps each) at which each part of a cluster is full.

    Attributes:
        simulators: every one on a core of its own, no wait.
        policy: of the GPUs' forward passes.
        actors: of the replicas' event loops, whatever their model takes.
        driver: of the one process that hands out episodes and writes the journal.
        reached: all of them together.
        network_mb_per_s: of observations, when as many answers are given.
    """

    simulators: float
    policy: float
    actors: float
    driver: float
    reached: float
    network_mb_per_s: float

    @property
    def fullest(self) -> str:
        """What limits."""
        limits = {name: getattr(self, name) for name in ("simulators", "policy", "actors", "driver")}
        return min(limits, key=lambda name: limits[name])


@dataclass(frozen=True)
class Constants:
    """What was measured on this machine.

    Attributes:
        chunk_s: CPU seconds of a simulator for 8 control steps and the pictures of one.
        answer_s: of a replica per answer, beyond its forward pass, with many callers.
        driver_s: CPU seconds of the driver per episode.
    """

    chunk_s: float
    answer_s: float
    driver_s: float

    @classmethod
    def of(cls, figures: Mapping[str, Any], profile: str = "exact") -> Constants:
        """From `benchmarks.rollout`'s figures of speed, overhead and scaling."""
        speed = figures["speed"]
        played = speed["service"][profile]
        return cls(
            chunk_s=EXECUTE * median(one["sim_cpu_s"] / one["steps"] for one in played),
            answer_s=median(figures["overhead"]["ms"]["8"]) / 1e3,
            driver_s=figures["scaling"]["driver_cpu_ms"] / 1e3,
        )


def forward_on_gpu(figures: Mapping[str, Any], memory: str = "gru") -> ForwardTime:
    """What `benchmarks.gpu` measured of this memory: the line through its times by batch."""
    told = figures["acting"]["memories"][memory]
    return ForwardTime(told["fixed_ms"] / 1e3, told["per_row_ms"] / 1e3)


def limits(constants: Constants, simulators: int, gpus: int, forward: ForwardTime = PI0) -> Limits:
    """Of so many simulators with a core each, and one replica per GPU."""
    reached = min(
        best_rate(simulators, constants.chunk_s, forward, gpus),
        gpus / constants.answer_s,
        _EPISODE_CHUNKS / constants.driver_s,
    )
    return Limits(
        simulators=simulators / constants.chunk_s,
        policy=gpus / forward.per_row_s,
        actors=gpus / constants.answer_s,
        driver=_EPISODE_CHUNKS / constants.driver_s,
        reached=reached,
        network_mb_per_s=reached * _ANSWER_MB,
    )


def gpus_for(constants: Constants, simulators: int, share: float = 0.9, forward: ForwardTime = PI0) -> int:
    """The fewest GPUs whose policy lets the simulators give this share of what they could without waiting.

    A simulator waits for at least one forward pass per chunk, so the share is of what is then left.
    """
    wanted = share * simulators / (constants.chunk_s + forward(1))
    gpus = 1
    while best_rate(simulators, constants.chunk_s, forward, gpus) < wanted:
        gpus += 1
    return gpus
