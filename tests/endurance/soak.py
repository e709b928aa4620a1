"""The service over thousands of episodes: does any of its processes grow, and is anything left behind?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import ray

from ipvla.rollout.evaluation import evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.types import EpisodeResult, EpisodeSpec
from tests.endurance.recall_service import RecallService, left_behind, service_processes

#: More than a simulator worker keeps open, so that every round builds worlds and closes them.
_TASKS = 8
#: Evaluations by the same processes, one after another.
_ROUNDS = 10
_MB = 2**20


@dataclass(frozen=True)
class Growth:
    """Of one process, after the warm-up.

    Attributes:
        kind: "driver", "simulator", "policy", "raylet", "gcs".
        memory_mb: of its own (USS), at the end.
        slope_mb_per_1000: of a line through its memory, per 1,000 episodes.
        files: open ones at the end, beyond those at the first reading.
        course_mb: its memory at every reading: a line that rises to the end, or steps that end.
    """

    kind: str
    memory_mb: float
    slope_mb_per_1000: float
    files: int
    course_mb: Sequence[float]


@dataclass(frozen=True)
class Soak:
    """Of one run of the service.

    Attributes:
        processes: those that lived from beginning to end.
        replaced: those that did not.
        leases: episodes that the policy still held at the end.
        actors: that were alive after the service had been closed.
        object_store_mb: that Ray's object store still held then.
    """

    episodes: int
    wall_s: float
    processes: Sequence[Growth]
    replaced: int
    leases: int
    actors: int
    object_store_mb: float

    @property
    def steepest(self) -> float:
        """MB per 1,000 episodes, of the process that grows most."""
        return max(process.slope_mb_per_1000 for process in self.processes)


@dataclass(frozen=True)
class _Reading:
    episodes: int
    memory_mb: Mapping[psutil.Process, float]
    files: Mapping[psutil.Process, int]


def measure_soak(
    service: RecallService, episodes: int, every: int, journal: Path, tell: Callable[[int], None], warm_up: int
) -> Soak:
    """Plays so many episodes in some evaluations, and reads every process's memory after each `every` of them.

    What they do in `warm_up` short evaluations before does not count: a simulator's memory is at its highest once
    it has built and closed some thirty worlds, in whatever order, and a driver's once it has handed out some two
    thousand episodes (with simulators that only wait it is flat from there on).
    """
    readings: list[_Reading] = []
    kinds: dict[psutil.Process, str] = {}

    def on_result(_: EpisodeResult) -> None:
        counted.append(None)
        if len(counted) % every == 0:
            kinds.update(service_processes())
            readings.append(_read(len(counted), list(kinds)))
            tell(len(counted))

    counted: list[None] = []
    with service.running() as (pool, policy), Journal(journal, {}) as records:
        for _ in range(warm_up):
            for _ in pool.run(service.specs(_TASKS, 2 * _TASKS), policy):
                pass
        specs, started = service.specs(_TASKS, episodes), time.perf_counter()
        for number in range(_ROUNDS):
            evaluate_episodes(_share(specs, number), pool, policy, records, on_result=on_result)
        wall_s, leases = time.perf_counter() - started, int(policy.stats()["episodes"])
    alive = left_behind()
    held = ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]
    lasting = [process for process in kinds if all(process in reading.memory_mb for reading in readings)]
    return Soak(
        episodes=len(counted),
        wall_s=wall_s,
        processes=[_growth(kinds[process], process, readings) for process in lasting],
        replaced=len(kinds) - len(lasting),
        leases=leases,
        actors=alive,
        object_store_mb=held / _MB,
    )


def _share(specs: Sequence[EpisodeSpec], number: int) -> Sequence[EpisodeSpec]:
    size = -(-len(specs) // _ROUNDS)
    return specs[number * size : (number + 1) * size]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through the points."""
    return float(np.polyfit(x, y, 1)[0])


def _growth(kind: str, process: psutil.Process, readings: Sequence[_Reading]) -> Growth:
    memory = [reading.memory_mb[process] for reading in readings]
    return Growth(
        kind=kind,
        memory_mb=memory[-1],
        slope_mb_per_1000=1000 * slope([reading.episodes for reading in readings], memory),
        files=readings[-1].files[process] - readings[0].files[process],
        course_mb=[round(one, 2) for one in memory],
    )


def _read(episodes: int, processes: Sequence[psutil.Process]) -> _Reading:
    memory_mb, files = {}, {}
    for process in processes:
        try:
            memory_mb[process], files[process] = process.memory_full_info().uss / _MB, process.num_fds()
        except psutil.NoSuchProcess:
            memory_mb.pop(process, None)
    return _Reading(episodes, memory_mb, files)
