"""The service while its processes are killed: is any episode lost, doubled, or another one than undisturbed?"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from ipvla.rollout.evaluation import SimPool
from ipvla.rollout.journal import Journal
from ipvla.rollout.policy_actor import PolicyService
from ipvla.types import EpisodeResult, EpisodeSpec
from tests.endurance.recall_service import RecallService, actors

_TASKS = 6
#: A kill is chance here, not a defect of the episode: no number of them is to end the run.
_ATTEMPTS = 100


@dataclass(frozen=True)
class Chaos:
    """Of the same episodes, undisturbed and disturbed.

    Attributes:
        kills: "simulator" or "policy" -> processes that were ended by SIGKILL.
        attempts: that episodes were played in, more than one each.
        lost: episodes without a record.
        doubled: results beyond an episode's first.
        different: episodes of which any action, the outcome, or the true state at the end is another.
        undisturbed_s: wall time.
        disturbed_s: wall time.
    """

    episodes: int
    kills: Mapping[str, int]
    attempts: int
    lost: int
    doubled: int
    different: int
    undisturbed_s: float
    disturbed_s: float


def measure_chaos(
    service: RecallService,
    episodes: int,
    between_kills_s: tuple[float, float],
    journals: Path,
    most_kills: float = math.inf,
) -> Chaos:
    """Kills a random simulator or replica again and again, at intervals that are drawn from this range."""
    specs = service.specs(_TASKS, episodes)
    with service.running() as (pool, policy):
        list(pool.run(service.specs(_TASKS, len(pool)), policy))  # to load the simulators
        undisturbed = _play(pool, policy, specs, journals / "undisturbed.sqlite")
        with Killer(between_kills_s, most_kills) as killer:
            disturbed = _play(pool, policy, specs, journals / "disturbed.sqlite")
    return Chaos(
        episodes=episodes,
        kills=dict(killer.kills),
        attempts=sum(result.spec.attempt for result in disturbed.records.values()),
        lost=sum(spec.key not in disturbed.records for spec in specs),
        doubled=sum(count - 1 for count in disturbed.yielded.values()),
        different=sum(
            spec.key in disturbed.records
            and not same_episode(undisturbed.records[spec.key], disturbed.records[spec.key])
            for spec in specs
        ),
        undisturbed_s=undisturbed.wall_s,
        disturbed_s=disturbed.wall_s,
    )


@dataclass
class Killer:
    """Within its `with`, kills one of this job's actors after another."""

    between_s: tuple[float, float]
    most: float = math.inf
    seed: int = 0
    kills: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Self:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._kill)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _kill(self) -> None:
        random = np.random.default_rng(self.seed)
        while self.kills.total() < self.most and not self._ended.wait(random.uniform(*self.between_s)):
            alive = sorted(actors().items(), key=lambda actor: actor[0].pid)
            if alive:
                process, kind = alive[random.integers(len(alive))]
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                    self.kills[kind] += 1


def same_episode(one: EpisodeResult, other: EpisodeResult) -> bool:
    """Whether all is equal but the attempt and the times."""
    assert one.trace is not None
    assert other.trace is not None
    return (one.outcome, one.steps, one.policy_steps, one.details) == (
        other.outcome,
        other.steps,
        other.policy_steps,
        other.details,
    ) and np.array_equal(one.trace.actions, other.trace.actions)


@dataclass(frozen=True)
class _Played:
    records: Mapping[str, EpisodeResult]
    yielded: Counter[str]
    wall_s: float


def _play(pool: SimPool, policy: PolicyService, specs: Sequence[EpisodeSpec], path: Path) -> _Played:
    started, yielded = time.perf_counter(), Counter[str]()
    with Journal(path, {}) as journal:
        for result in pool.run(journal.missing(specs), policy, max_attempts=_ATTEMPTS):
            journal.record(result)
            yielded[result.spec.key] += 1
        wall_s = time.perf_counter() - started
        records = {r.spec.key: replace(r, trace=journal.trace(r.spec)) for r in journal.results()}
    return _Played(records, yielded, wall_s)
