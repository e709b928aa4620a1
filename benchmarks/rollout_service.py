"""What the rollout service takes for episodes, and what a policy's answer takes beyond its forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import ray
import torch

from benchmarks.rollout_meter import MeteredSimulators
from benchmarks.rollout_policy import CAMERAS
from ipvla import policy as trained
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.evaluation import SimPool
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.rollout.policy_client import PolicyClient
from ipvla.rollout.policy_server import BatchPolicy
from ipvla.rollout.sim_pool import MOST_PER_CORE, cluster_cores, cluster_room, simulators_for
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.protocols import EvaluationProtocol
from ipvla.sim.simulator import Split
from ipvla.types import EpisodeSpec, Memory, Observation


@dataclass(frozen=True)
class Throughput:
    """Of episodes that were played by a service whose simulators were loaded already.

    Attributes:
        simulators: that played.
        wall_s: in all.
        physics_cpu_s: of resets and control steps, those to settle among them.
        frames_cpu_s: of the frames that were asked for.
        act_cpu_s: of the policy, from observations to actions.
        sim_cpu_s: of the simulators' processes but for asking the policy: physics, frames, what the protocol makes
            of them, and Ray's threads meanwhile.
        mean_batch: observations per forward pass.
    """

    episodes: int
    steps: int
    simulators: int
    wall_s: float
    physics_cpu_s: float
    frames_cpu_s: float
    act_cpu_s: float
    sim_cpu_s: float
    mean_batch: float

    def efficiency(self, cores: int) -> float:
        """Share of the cores' time that went into what episodes need, in [0, 1]."""
        return (self.physics_cpu_s + self.frames_cpu_s + self.act_cpu_s) / (self.wall_s * cores)


def play_by_service(
    cache_dir: Path,
    policy_directory: Path,
    protocol: EvaluationProtocol,
    suite: str,
    tasks: Sequence[str],
    trials: int,
    *,
    num_simulators: int | None,
    profile: str,
) -> Throughput:
    """Plays trials of these tasks, after some to load the simulators.

    Args:
        num_simulators: None for as many as an evaluation finds by itself.
    """
    simulators = MeteredSimulators(SuiteSimulators(cache_dir, protocol=protocol, profile=profile))
    policy = PolicyService(PolicySource(trained.Policy.load, policy_directory))

    def specs(first: int, count: int) -> list[EpisodeSpec]:
        chosen = range(first, first + count)
        return [EpisodeSpec(suite, task, Split.HELD_OUT.seed(i), i) for task in tasks for i in chosen]

    cores = cluster_cores()
    with SimPool(simulators, num_simulators or cores, execute=protocol.execute, cpus_per_simulator=0) as pool:
        warm_up = -(-MOST_PER_CORE * cores // len(tasks))
        pool.start()
        loading = list(pool.run(specs(0, warm_up), policy))
        if num_simulators is None:
            waiting = sum(result.policy_s for result in loading) / sum(result.wall_s for result in loading)
            pool.add(simulators_for(cores, waiting, policy.stats()["busy"], cluster_room()) - len(pool))
            pool.start()
            list(pool.run(specs(0, warm_up), policy))
        before, started = policy.stats(), time.perf_counter()
        results = list(pool.run(specs(warm_up, trials), policy))
        wall_s, after = time.perf_counter() - started, policy.stats()
        count = len(pool)
    policy.close()
    told = {name: after[name] - before[name] for name in ("act_cpu_s", "forwards", "requests")}
    return Throughput(
        episodes=len(results),
        steps=sum(result.steps for result in results),
        simulators=count,
        wall_s=wall_s,
        physics_cpu_s=sum(result.details["physics_cpu_s"] for result in results),
        frames_cpu_s=sum(result.details["frames_cpu_s"] for result in results),
        act_cpu_s=told["act_cpu_s"],
        sim_cpu_s=sum(result.sim_cpu_s for result in results),
        mean_batch=told["requests"] / told["forwards"],
    )


@dataclass(frozen=True)
class IdlePolicies:
    """Loads, from any directory, a policy that waits `act_s` seconds, with a memory of `width` floats."""

    act_s: float = 0.0
    width: int = 256

    def __call__(self, _directory: Path) -> BatchPolicy:
        return _IdlePolicy(self)


@dataclass(frozen=True)
class _IdlePolicy:
    config: IdlePolicies
    execute: int = 8

    def initial_memory(self, batch: int) -> Memory:
        return {"hidden": torch.zeros(batch, self.config.width)}

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        if self.config.act_s:
            time.sleep(self.config.act_s)
        return np.zeros((len(observations), self.execute, 7), np.float32), memory


class _Caller:
    """A simulator's place in the service, without the simulator."""

    def ask(self, caller: str, client: PolicyClient, steps: int) -> list[float]:
        """Seconds of every call but the first few."""
        images = {camera: np.zeros((224, 224, 3), np.uint8) for camera in CAMERAS}
        seconds, name = [], EpisodeId(caller)
        for step in range(steps):
            observation = Observation(images, np.zeros(8, np.float32), "put the bowl on the plate", step)
            started = time.perf_counter()
            client.act(name, observation, step)
            seconds.append(time.perf_counter() - started)
        client.end(name)
        return seconds[steps // 10 :]


class _Nobody:
    """Takes a policy actor's place and answers without a policy, a queue or a thread."""

    def act(self, name: EpisodeId, step: int, observation: Observation) -> npt.NDArray[np.float32]:
        return np.zeros((_IdlePolicy.execute, 7), np.float32)

    def end(self, name: EpisodeId) -> None: ...


def bare_call_ms(steps: int) -> float:
    """Milliseconds that a lone caller waits for an actor that does nothing with the same pictures."""
    nobody, caller = (ray.remote(num_cpus=0)(kind).remote() for kind in (_Nobody, _Caller))
    waits: list[float] = ray.get(caller.ask.remote("bare", PolicyClient(nobody), steps))
    for actor in (nobody, caller):
        ray.kill(actor)
    return 1e3 * median(waits)


def act_overhead_ms(
    callers: int, steps: int, scratch: Path, load: Callable[[Path], BatchPolicy] = IdlePolicies()
) -> float:
    """Milliseconds per answer beyond `policy.act`, with so many callers of two 224 px pictures each.

    Of a lone caller the median of what it waits; of several what an answer takes when all ask all the time.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    service = PolicyService(PolicySource(load, scratch))
    client = service.client()
    actors = [ray.remote(num_cpus=0)(_Caller).remote() for _ in range(callers)]
    ray.get([actor.ask.remote(f"warm {i}", client, min(steps, 20)) for i, actor in enumerate(actors)])
    before, started = service.stats(), time.perf_counter()
    waits = ray.get([actor.ask.remote(str(i), client, steps) for i, actor in enumerate(actors)])
    wall_s, after = time.perf_counter() - started, service.stats()
    for actor in actors:
        ray.kill(actor)
    service.close()
    requests = after["requests"] - before["requests"]
    act_s = (after["act_s"] - before["act_s"]) / requests
    answer_s = median(waits[0]) if callers == 1 else wall_s / requests
    return 1e3 * (answer_s - act_s)
