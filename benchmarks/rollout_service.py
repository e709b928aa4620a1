"""What the rollout service takes for episodes, and what a policy's answer takes beyond its forward pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from benchmarks.rollout_policy import CAMERAS
from ipvla.policy import Policy
from ipvla.rollout.evaluation import SimPool
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.rollout.policy_client import PolicyClient
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.protocols import Protocol
from ipvla.sim.simulator import Split
from ipvla.types import EpisodeSpec, Memory, Observation


@dataclass(frozen=True)
class Throughput:
    """Of episodes that were played by a service whose simulators were loaded already.

    Attributes:
        wall_s: in all.
        sim_cpu_s: of physics and of the frames that were asked for.
        forward_cpu_s: of the policy's forward passes.
        mean_batch: observations per forward pass.
    """

    episodes: int
    steps: int
    wall_s: float
    sim_cpu_s: float
    forward_cpu_s: float
    mean_batch: float

    def efficiency(self, cores: int) -> float:
        """Share of the cores' time that went into what episodes need, in [0, 1]."""
        return (self.sim_cpu_s + self.forward_cpu_s) / (self.wall_s * cores)


def play_by_service(
    cache_dir: Path,
    policy_directory: Path,
    protocol: Protocol,
    suite: str,
    tasks: Sequence[str],
    trials: int,
    *,
    num_simulators: int,
    profile: str,
) -> Throughput:
    """Plays trials of these tasks, after some to load the simulators."""
    simulators = SuiteSimulators(cache_dir, protocol=protocol, profile=profile)
    policy = PolicyService(PolicySource(Policy.load, policy_directory))

    def specs(first: int, count: int) -> list[EpisodeSpec]:
        chosen = range(first, first + count)
        return [EpisodeSpec(suite, task, Split.HELD_OUT.seed(i), i) for task in tasks for i in chosen]

    with SimPool(simulators, num_simulators, execute=protocol.execute, cpus_per_simulator=0) as pool:
        warm_up = -(-num_simulators // len(tasks))
        list(pool.run(specs(0, warm_up), policy))
        before, started = policy.stats(), time.perf_counter()
        results = list(pool.run(specs(warm_up, trials), policy))
        wall_s, after = time.perf_counter() - started, policy.stats()
    policy.close()
    told = {name: after[name] - before[name] for name in ("forward_cpu_s", "forwards", "requests")}
    return Throughput(
        episodes=len(results),
        steps=sum(result.steps for result in results),
        wall_s=wall_s,
        sim_cpu_s=sum(result.sim_cpu_s for result in results),
        forward_cpu_s=told["forward_cpu_s"],
        mean_batch=told["requests"] / told["forwards"],
    )


class _Instant:
    """A policy that takes no time."""

    execute = 8

    def initial_memory(self, batch: int) -> Memory:
        return {"hidden": torch.zeros(batch, 256)}

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        return np.zeros((len(observations), 8, 7), np.float32), memory


def _instant(_directory: Path) -> Any:
    return _Instant()


class _Caller:
    """A simulator's place in the service, without the simulator."""

    def ask(self, name: str, client: PolicyClient, steps: int) -> list[float]:
        """Seconds of every call but the first few."""
        images = {camera: np.zeros((224, 224, 3), np.uint8) for camera in CAMERAS}
        seconds = []
        for step in range(steps):
            observation = Observation(images, np.zeros(8, np.float32), "put the bowl on the plate", step)
            started = time.perf_counter()
            client.act(name, observation, step)
            seconds.append(time.perf_counter() - started)
        client.end(name)
        return seconds[steps // 10 :]


def act_overhead_ms(callers: int, steps: int, scratch: Path) -> float:
    """Milliseconds per answer beyond the forward pass, with so many callers of two 224 px pictures each.

    Of a lone caller the median of what it waits; of several what an answer takes when all ask all the time.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    service = PolicyService(PolicySource(_instant, scratch))
    client = service.client()
    actors = [ray.remote(num_cpus=0)(_Caller).remote() for _ in range(callers)]
    ray.get([actor.ask.remote(f"warm {i}", client, 20) for i, actor in enumerate(actors)])
    before, started = service.stats(), time.perf_counter()
    waits = ray.get([actor.ask.remote(str(i), client, steps) for i, actor in enumerate(actors)])
    wall_s, after = time.perf_counter() - started, service.stats()
    for actor in actors:
        ray.kill(actor)
    service.close()
    requests = after["requests"] - before["requests"]
    forward_s = (after["forward_s"] - before["forward_s"]) / requests
    answer_s = median(waits[0]) if callers == 1 else wall_s / requests
    return 1e3 * (answer_s - forward_s)
