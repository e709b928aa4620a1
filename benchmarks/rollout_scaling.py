"""How the service scales: waiting simulators and a waiting policy against what no service could exceed."""

from __future__ import annotations

import heapq
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.rollout_stub import JITTER, ForwardTime, WaitingPolicies, WaitingSimulators
from ipvla.rollout.evaluation import SimPool, evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.sim.simulator import Split
from ipvla.types import EpisodeSpec

#: Seconds that a simulator takes for a chunk of 8 control steps, about as libero_spatial's do with a core each.
CHUNK_S: Final = 0.4
#: One that many simulators do not fill, as a small model's on a GPU, and one that they do.
FORWARDS: Final = {"light": ForwardTime(0.03, 0.0005), "heavy": ForwardTime(0.1, 0.01)}
ACTORS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Above this share of the cores' time the machine, not the service, is what is measured.
CORES_ARE_THE_LIMIT: Final = 0.9
_SAMPLE_S = 0.25
_ROUNDS = 2  # episodes of each simulator
_BATCHES = range(1, 4097)
_SIMULATED_S = 300.0


@dataclass(frozen=True)
class ScalingPoint:
    """Of a run by so many simulators.

    Attributes:
        forward: a key of `FORWARDS`.
        answers_per_s: chunks that the policy gave, while all simulators were at work.
        bound: answers per second that nothing could exceed: `best_rate`.
        simple_bound: the smaller of what the simulators could ask for if nobody else asked, and what the policy
            could answer if all asked at once; out of reach where both are about as large.
        ideal: answers per second of a service that itself takes no time: `ideal_rate`.
        mean_batch: of the policy's forward passes.
        cpu: share of all cores' time, in [0, 1].
    """

    forward: str
    actors: int
    answers_per_s: float
    bound: float
    simple_bound: float
    ideal: float
    mean_batch: float
    cpu: float

    @property
    def to_bound(self) -> float:
        return self.answers_per_s / self.bound

    @property
    def to_ideal(self) -> float:
        return self.answers_per_s / self.ideal


def best_rate(simulators: int, chunk_s: float, forward: ForwardTime, replicas: int = 1) -> float:
    """Answers per second that no schedule can exceed.

    With a mean batch b every simulator spends at least chunk_s + forward(b) on a chunk, and a replica answers at
    most b per forward(b): the smaller of both, at the b for which it is largest.
    """
    return max(
        min(simulators / (chunk_s + forward(batch)), replicas * batch / forward(batch))
        for batch in _BATCHES
        if batch <= simulators
    )


def simple_rate(simulators: int, chunk_s: float, forward: ForwardTime) -> float:
    """min(simulators' supply, policy's capacity), each as if the other did not matter."""
    return min(simulators / (chunk_s + forward(1)), simulators / forward(simulators))


def ideal_rate(simulators: int, chunk_s: float, forward: ForwardTime) -> float:
    """Answers per second of a service that takes no time of its own and lets nobody who waits wait for company.

    By simulation: chunks take as long as the stub's, at random, so whoever asks while the policy is at work waits.
    That is what lies between this and `best_rate`, which nobody could reach without knowing the future.
    """
    draw = random.Random(0)
    asking = [(draw.uniform(0, chunk_s), simulator) for simulator in range(simulators)]  # when, a heap
    heapq.heapify(asking)
    now = answers = 0.0
    while now < _SIMULATED_S:
        begin, batch = max(now, asking[0][0]), []
        while asking and asking[0][0] <= begin:
            batch.append(heapq.heappop(asking)[1])
        now = begin + forward(len(batch))
        answers += len(batch)
        for simulator in batch:
            heapq.heappush(asking, (now + chunk_s * draw.uniform(1 - JITTER, 1 + JITTER), simulator))
    return answers / now


def measure_scaling(
    scratch: Path, actors: Sequence[int], chunks: int, tell: Callable[[ScalingPoint], None]
) -> list[ScalingPoint]:
    """A point for every number of simulators, in ascending order, and forward pass; Ray must be connected."""
    points = []
    with SimPool(WaitingSimulators(CHUNK_S, chunks), actors[0], execute=None, cpus_per_simulator=0) as pool:
        for count in actors:
            pool.add(count - len(pool))
            _warm_up(pool, scratch, count)
            for name, forward in FORWARDS.items():
                points.append(_measured(pool, scratch, name, forward, count))
                tell(points[-1])
    return points


@dataclass(frozen=True)
class _Sample:
    s: float
    requests: float
    forwards: float
    busy_s: float


def _measured(pool: SimPool, scratch: Path, name: str, forward: ForwardTime, actors: int) -> ScalingPoint:
    policy = PolicyService(PolicySource(WaitingPolicies(forward), scratch))
    policy.client()
    samples: list[_Sample] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            told, cpu = policy.stats(), psutil.cpu_times()
            busy_s = sum(cpu) - cpu.idle - cpu.iowait
            samples.append(_Sample(time.perf_counter(), told["requests"], told["forwards"], busy_s))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in pool.run(_specs(actors, _ROUNDS), policy):
        pass
    ended.set()
    watcher.join()
    policy.close()
    # At the beginning and at the end not all simulators are at work.
    first, last = samples[len(samples) // 4], samples[-(len(samples) // 4) - 1]
    wall_s, requests = last.s - first.s, last.requests - first.requests
    return ScalingPoint(
        forward=name,
        actors=actors,
        answers_per_s=requests / wall_s,
        bound=best_rate(actors, CHUNK_S, forward),
        simple_bound=simple_rate(actors, CHUNK_S, forward),
        ideal=ideal_rate(actors, CHUNK_S, forward),
        mean_batch=requests / max(last.forwards - first.forwards, 1),
        cpu=(last.busy_s - first.busy_s) / (wall_s * (os.cpu_count() or 1)),
    )


def driver_cpu_ms(scratch: Path, episodes: int) -> float:
    """CPU milliseconds of the driver per episode, of simulators and a policy that take no time."""
    policy = PolicyService(PolicySource(WaitingPolicies(ForwardTime(0.0, 0.0)), scratch))
    with SimPool(WaitingSimulators(0.0, 1), 4, cpus_per_simulator=0) as pool:
        list(pool.run(_specs(4, 1), policy))
        before_s = time.process_time()
        with Journal(scratch / "driver.sqlite", {"run": str(time.time())}) as journal:
            evaluate_episodes(_specs(episodes, 1), pool, policy, journal)
        after_s = time.process_time()
    policy.close()
    (scratch / "driver.sqlite").unlink()
    return 1e3 * (after_s - before_s) / episodes


def _warm_up(pool: SimPool, scratch: Path, actors: int) -> None:
    """Every simulator gets its process, which takes the cores, and its world."""
    pool.start()
    policy = PolicyService(PolicySource(WaitingPolicies(ForwardTime(0.0, 0.0)), scratch))
    list(pool.run(_specs(actors, 1), policy))
    policy.close()


def _specs(actors: int, rounds: int) -> list[EpisodeSpec]:
    return [EpisodeSpec("waiting", "wait", Split.HELD_OUT.seed(i), i) for i in range(actors * rounds)]
