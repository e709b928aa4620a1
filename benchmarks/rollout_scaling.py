"""How the service scales: waiting simulators and a waiting policy against what no service could exceed.

On paper: what a cluster of simulators and GPUs would give, by what was measured here or published elsewhere.
"""

from __future__ import annotations

import heapq
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil

from benchmarks.rollout_stub import EXECUTE, JITTER, NO_TIME, ForwardTime, WaitingPolicies, WaitingSimulators
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
#: pi0 on an RTX 4090 (Black et al. 2024, appendix on inference): 14 + 32 ms for pictures and prompt, 27 ms for ten
#: steps of the action expert. Assumed here: every row of a batch pays the former, a batch the latter.
PI0: Final = ForwardTime(0.027, 0.046)
#: Two pictures of 224 px as they are, and what goes with them.
_ANSWER_MB: Final = 0.31
_EPISODE_CHUNKS: Final = 27.5  # 220 control steps, libero_spatial's horizon
_SAMPLE_S = 0.25
_ROUNDS = 2  # episodes of each simulator
_BATCHES = range(1, 4097)
_SIMULATED_S = 300.0


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


def ideal_rate(simulators: int, chunk_s: float, forward: ForwardTime) -> float:
    """Answers per second of a service that takes no time of its own and lets nobody who waits wait for company.

    By simulation: chunks take as long as the stub's, at random, so a request while the policy is at work waits.
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


def measure_scaling(scratch: Path, actors: Sequence[int], chunks: int) -> Iterator[dict[str, Any]]:
    """A point for every number of simulators, in ascending order, and forward pass; Ray must be connected.

    Yields:
        `answers_per_s`: chunks that the policy gave, while all simulators were at work; `to_bound` and `to_ideal`
        are its ratios to `best_rate` and `ideal_rate`. `mean_batch` of the policy's forward passes. `cpu`, the
        share of all cores' time in [0, 1].
    """
    with SimPool(WaitingSimulators(CHUNK_S, chunks), actors[0], execute=None, cpus_per_simulator=0) as pool:
        for count in actors:
            pool.add(count - len(pool))
            pool.start()  # every simulator gets its process, which takes the cores, and its world
            policy = PolicyService(PolicySource(NO_TIME, scratch))
            list(pool.run(_specs(count), policy))
            policy.close()
            for name in FORWARDS:
                yield _measured(pool, scratch, name, count)


def _measured(pool: SimPool, scratch: Path, name: str, actors: int) -> dict[str, Any]:
    forward = FORWARDS[name]
    policy = PolicyService(PolicySource(WaitingPolicies(forward), scratch))
    policy.client()
    samples: list[tuple[float, float, float, float]] = []  # time, requests, forward passes, busy seconds
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            told, cpu = policy.stats(), psutil.cpu_times()
            busy_s = sum(cpu) - cpu.idle - cpu.iowait
            samples.append((time.perf_counter(), told["requests"], told["forwards"], busy_s))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in pool.run(_specs(actors * _ROUNDS), policy):
        pass
    ended.set()
    watcher.join()
    policy.close()
    # At the beginning and at the end not all simulators are at work.
    ends = zip(samples[-(len(samples) // 4) - 1], samples[len(samples) // 4], strict=True)
    wall_s, requests, forwards, busy_s = (last - first for last, first in ends)
    rate, best, ideal = (
        requests / wall_s,
        best_rate(actors, CHUNK_S, forward),
        ideal_rate(actors, CHUNK_S, forward),
    )
    return {
        "forward": name,
        "actors": actors,
        "answers_per_s": rate,
        "bound": best,
        "ideal": ideal,
        "mean_batch": requests / max(forwards, 1),
        "cpu": busy_s / (wall_s * (os.cpu_count() or 1)),
        "to_bound": rate / best,
        "to_ideal": rate / ideal,
    }


def driver_cpu_ms(scratch: Path, episodes: int) -> float:
    """CPU milliseconds of the driver per episode, of simulators and a policy that take no time."""
    policy = PolicyService(PolicySource(NO_TIME, scratch))
    with SimPool(WaitingSimulators(0.0, 1), 4, cpus_per_simulator=0) as pool:
        list(pool.run(_specs(4), policy))
        before_s = time.process_time()
        with Journal(scratch / "driver.sqlite", {"run": str(time.time())}) as journal:
            evaluate_episodes(_specs(episodes), pool, policy, journal)
        after_s = time.process_time()
    policy.close()
    (scratch / "driver.sqlite").unlink()
    return 1e3 * (after_s - before_s) / episodes


def _specs(episodes: int) -> list[EpisodeSpec]:
    return [EpisodeSpec("waiting", "wait", Split.HELD_OUT.seed(i), i) for i in range(episodes)]


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
        played = figures["speed"]["service"][profile]
        chunk_s = EXECUTE * median(one["sim_cpu_s"] / one["steps"] for one in played)
        answer_s = median(figures["overhead"]["ms"]["8"]) / 1e3
        return cls(chunk_s, answer_s, figures["scaling"]["driver_cpu_ms"] / 1e3)


def forward_on_gpu(figures: Mapping[str, Any], memory: str = "gru") -> ForwardTime:
    """What `benchmarks.gpu` measured of this memory: the line through its times by batch."""
    told = figures["acting"]["memories"][memory]
    return ForwardTime(told["fixed_ms"] / 1e3, told["per_row_ms"] / 1e3)


def limits(constants: Constants, simulators: int, gpus: int, forward: ForwardTime = PI0) -> dict[str, float]:
    """Answers per second (8 control steps each) at which each part of a cluster is full.

    Returns:
        simulators: every one on a core of its own, no wait.
        policy: of the GPUs' forward passes, one replica per GPU.
        actors: of the replicas' event loops, whatever their model takes.
        driver: of the one process that hands out episodes and writes the journal.
        reached: all of them together.
        network_mb_per_s: of observations, when as many answers are given.
    """
    actors, driver = gpus / constants.answer_s, _EPISODE_CHUNKS / constants.driver_s
    reached = min(best_rate(simulators, constants.chunk_s, forward, gpus), actors, driver)
    alone = {"simulators": simulators / constants.chunk_s, "policy": gpus / forward.per_row_s}
    together = {"reached": reached, "network_mb_per_s": reached * _ANSWER_MB}
    return {**alone, "actors": actors, "driver": driver, **together}


def gpus_for(constants: Constants, simulators: int, share: float = 0.9, forward: ForwardTime = PI0) -> int:
    """The fewest GPUs whose policy lets the simulators give this share of what they could without waiting.

    A simulator waits for at least one forward pass per chunk, so the share is of what is then left.
    """
    wanted = share * simulators / (constants.chunk_s + forward(1))
    gpus = 1
    while best_rate(simulators, constants.chunk_s, forward, gpus) < wanted:
        gpus += 1
    return gpus
