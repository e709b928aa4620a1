"""What a serial loop and the rollout service take for episodes, and an answer beyond its forward pass.

The serial loop's order of things is that of public evaluation scripts (OpenVLA-OFT's `run_libero_eval`): one
environment of LIBERO's, every frame rendered, one episode at a time; policy and pictures are those of the service.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import ray
import torch

from benchmarks.rollout_stub import EXECUTE, NO_TIME
from ipvla import policy as trained
from ipvla.data.conventions import Conventions
from ipvla.data.statistics import Statistics
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.evaluation import SimPool
from ipvla.rollout.policy_actor import PolicyClient, PolicyService, PolicySource
from ipvla.rollout.policy_server import BatchPolicy
from ipvla.rollout.sim_pool import MOST_PER_CORE, cluster_cores, cluster_room, simulators_for
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.libero import axis_angle, configure
from ipvla.sim.protocol_simulator import ProtocolSimulator, preprocess
from ipvla.sim.protocols import EvaluationProtocol, load_protocol
from ipvla.sim.simulator import Simulator, Split, StepOutcome
from ipvla.sim.standard.assets import find_assets
from ipvla.sim.standard.tasks import bddl_file, initial_states, instruction
from ipvla.sim.suites import suite_entry
from ipvla.types import EpisodeSpec, Observation

#: What the policy is shown.
CAMERAS: Final = load_protocol("oft").cameras
_SEEN: Final = {camera: np.zeros((224, 224, 3), np.uint8) for camera in CAMERAS}


def save_untrained_policy(directory: Path, cameras: Sequence[str] = CAMERAS) -> Path:
    """Writes a policy with these cameras at 64 px, a GRU and chunks of 8, always the same; returns `directory`.

    It is of the real class; its weights are random, since time is all that counts.
    """
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.5, 0.5, (6000, 7)).astype(np.float32)
    actions[:, 6] = np.sign(actions[:, 6])
    statistics = Statistics.compute([actions], [rng.normal(size=(6000, 8)).astype(np.float32)])
    conventions = Conventions(statistics, tuple(cameras), image_size=64, chunk=EXECUTE)
    torch.manual_seed(0)
    config = IPVLAConfig(backbone=TinyConfig(max_prompt_tokens=64), chunk=EXECUTE)
    trained.Policy.build(config, conventions, EXECUTE).save(directory)
    return directory


def play_serially(
    cache_dir: Path, policy_directory: Path, protocol: EvaluationProtocol, suite: str, task: str, trials: int
) -> tuple[list[float], list[int]]:
    """Seconds and control steps of each trial, without what comes before the first one (imports, building)."""
    assert protocol.render_size is not None
    configure(cache_dir, find_assets(cache_dir))
    from libero.libero.envs import OffScreenRenderEnv

    policy, states = trained.Policy.load(policy_directory), initial_states(suite, task)
    size, horizon = protocol.render_size, protocol.horizon(suite, 0)
    environment = OffScreenRenderEnv(
        bddl_file_name=str(bddl_file(suite, task)), camera_heights=size, camera_widths=size
    )
    environment.seed(protocol.world_seed)
    seconds, steps = [], []
    for trial in range(trials):
        started = time.perf_counter()
        environment.reset()
        seen = environment.set_init_state(states[trial])
        for _ in range(protocol.settle_steps):
            seen, _, _, _ = environment.step(np.array(protocol.settle_action))
        memory, chunk, t, done = policy.initial_memory(1), deque[npt.NDArray[np.float32]](), 0, False
        while t < horizon and not done:
            if not chunk:
                actions, memory = policy.act([_observation(seen, protocol, instruction(task), t)], memory)
                chunk.extend(actions[0])
            seen, _, done, _ = environment.step(chunk.popleft().astype(np.float64))
            t += 1
        seconds.append(time.perf_counter() - started)
        steps.append(t)
    environment.close()
    return seconds, steps


def _observation(seen: dict[str, Any], protocol: EvaluationProtocol, words: str, t: int) -> Observation:
    turned = axis_angle(np.roll(seen["robot0_eef_quat"], 1))  # from x, y, z, w
    proprio = np.concatenate([seen["robot0_eef_pos"], turned, seen["robot0_gripper_qpos"]])
    images = {name: preprocess(seen[f"{name}_image"][::-1], protocol.pictures) for name in protocol.cameras}
    return Observation(images, proprio.astype(np.float32), words, t)


class MeteredSimulator:
    """The simulator, whose `details` also have `physics_cpu_s` and `frames_cpu_s` of the episode.

    Physics is what this thread spends in `reset` and `step`. Frames are what the process spends in `observe`: the
    renderer has a thread of its own.
    """

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._spent = {"physics_cpu_s": 0.0, "frames_cpu_s": 0.0}

    def reset(self, seed: int) -> None:
        self._spent = dict.fromkeys(self._spent, 0.0)
        with self._metered("physics_cpu_s", time.thread_time):
            self._simulator.reset(seed)

    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome:
        with self._metered("physics_cpu_s", time.thread_time):
            return self._simulator.step(action)

    def observe(self, geometry: bool = False) -> Observation:
        with self._metered("frames_cpu_s", time.process_time):
            return self._simulator.observe(geometry)

    def details(self) -> Mapping[str, Any]:
        return {**self._simulator.details(), **self._spent}

    @contextmanager
    def _metered(self, part: str, clock: Callable[[], float]) -> Iterator[None]:
        began_s = clock()
        yield
        self._spent[part] += clock() - began_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator, name)


@dataclass(frozen=True)
class MeteredSimulators:
    """Opens simulators that are metered below their protocol, whose pictures' preparation is so not counted."""

    simulators: SuiteSimulators

    def __call__(self, suite: str, task: str) -> Simulator:
        opened = self.simulators(suite, task)
        assert isinstance(opened, ProtocolSimulator)
        return ProtocolSimulator(
            cast(Simulator, MeteredSimulator(opened.simulator)), self.simulators.protocol, suite
        )


def efficiency(played: Mapping[str, float], cores: int) -> float:
    """Share of the cores' time that went into what episodes need, in [0, 1]."""
    needed = sum(played[f"{part}_cpu_s"] for part in ("physics", "frames", "act"))
    return needed / (played["wall_s"] * cores)


def play_by_service(
    cache_dir: Path,
    policy_directory: Path,
    protocol: EvaluationProtocol,
    suite: str,
    tasks: Sequence[str],
    trials: int,
    num_simulators: int | None,
    profile: str,
) -> dict[str, float]:
    """Plays trials of these tasks, after some to load the simulators; None for as many as an evaluation finds.

    Returns:
        simulators: that played.
        wall_s: in all.
        physics_cpu_s: of resets and control steps, those to settle among them.
        frames_cpu_s: of the frames that were asked for.
        act_cpu_s: of the policy, from observations to actions.
        sim_cpu_s: of the simulators' processes but for asking the policy: physics, frames, what the protocol makes
            of them, and Ray's threads meanwhile.
        mean_batch: observations per forward pass.
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
            room = cluster_room(suite_entry(suite).facts.simulator_bytes)
            pool.add(simulators_for(cores, waiting, policy.stats()["busy"], room) - len(pool))
            pool.start()
            list(pool.run(specs(0, warm_up), policy))
        before, started = policy.stats(), time.perf_counter()
        results = list(pool.run(specs(warm_up, trials), policy))
        wall_s, after = time.perf_counter() - started, policy.stats()
        count = len(pool)
    policy.close()
    told = {name: after[name] - before[name] for name in ("act_cpu_s", "forwards", "requests")}
    metered = {of: sum(result.details[of] for result in results) for of in ("physics_cpu_s", "frames_cpu_s")}
    return {
        "episodes": len(results),
        "steps": sum(result.steps for result in results),
        "simulators": count,
        "wall_s": wall_s,
        **metered,
        "act_cpu_s": told["act_cpu_s"],
        "sim_cpu_s": sum(result.sim_cpu_s for result in results),
        "mean_batch": told["requests"] / told["forwards"],
    }


class _Caller:
    """A simulator's place in the service, without the simulator."""

    def ask(self, caller: str, client: PolicyClient, steps: int) -> list[float]:
        """Seconds of every call but the first few."""
        seconds, name = [], EpisodeId(caller)
        for step in range(steps):
            observation = Observation(_SEEN, np.zeros(8, np.float32), "put the bowl on the plate", step)
            started = time.perf_counter()
            client.act(name, observation, step)
            seconds.append(time.perf_counter() - started)
        client.end(name)
        return seconds[steps // 10 :]


class _Nobody:
    """Takes a policy actor's place and answers without a policy, a queue or a thread."""

    def act(self, name: EpisodeId, step: int, observation: Observation) -> npt.NDArray[np.float32]:
        return np.zeros((EXECUTE, 7), np.float32)

    def end(self, name: EpisodeId) -> None: ...


def bare_call_ms(steps: int) -> float:
    """Milliseconds that a lone caller waits for an actor that does nothing with the same pictures."""
    nobody, caller = (ray.remote(num_cpus=0)(kind).remote() for kind in (_Nobody, _Caller))
    waits: list[float] = ray.get(caller.ask.remote("bare", PolicyClient(nobody), steps))
    for actor in (nobody, caller):
        ray.kill(actor)
    return 1e3 * median(waits)


def act_overhead_ms(
    callers: int, steps: int, scratch: Path, load: Callable[[Path], BatchPolicy] = NO_TIME
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
