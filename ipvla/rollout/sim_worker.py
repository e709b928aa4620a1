"""Runs episodes in one process: keeps the simulators that it has opened, asks the policy actor for actions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol as Structural

from ipvla.rollout.episode import Act, Chunk, InvalidActionError, run_episode
from ipvla.rollout.recorder import VideoRecorder
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.protocols import PROTOCOLS, Protocol
from ipvla.sim.simulator import Simulator
from ipvla.sim.suites import load_suite
from ipvla.types import EpisodeResult, EpisodeSpec, Observation

#: (suite, task) -> Simulator; picklable.
MakeSimulator = Callable[[str, str], Simulator]
_OPEN_SIMULATORS = 4


@dataclass(frozen=True)
class SuiteSimulators:
    """Opens the simulators of the suites by name, to be played by a protocol.

    Attributes:
        cache_dir: where a suite keeps its files.
        camera_size: side of rendered pictures in pixels, where the protocol leaves it open.
        protocol: how they are played.
        profile: how pictures are drawn, of `ipvla.sim.suites.PROFILES`.
    """

    cache_dir: Path
    camera_size: int = 64
    protocol: Protocol = PROTOCOLS["recall"]
    profile: str = "exact"

    def __call__(self, suite: str, task: str) -> Simulator:
        size = self.protocol.render_size or self.camera_size
        opened = load_suite(suite, self.cache_dir)
        simulator = opened.simulator(task, size, self.protocol.cameras, self.profile)
        return ProtocolSimulator(simulator, self.protocol, suite)


class RemotePolicy(Structural):
    """The policy as a worker sees it; `ipvla.rollout.policy_actor.PolicyClient` in production."""

    def act(self, episode_id: str, observation: Observation, policy_step: int) -> Chunk: ...
    def end(self, episode_id: str) -> None: ...


@dataclass(frozen=True)
class EpisodeJob:
    """One attempt at an episode; `video` asks for a recording at that path."""

    spec: EpisodeSpec
    policy: RemotePolicy
    video: Path | None = None


def episode_id(spec: EpisodeSpec) -> str:
    """The policy's name for this attempt: a rerun never meets the memory of the attempt before it."""
    return f"{spec.key}#{spec.attempt}"


class SimWorker:
    """A worker of `sim_pool.WorkerPool` for `EpisodeJob`s.

    Args:
        make_simulator: opens a task's simulator.
        execute: actions of every chunk that are played before the policy is asked again; None for all.
    """

    def __init__(self, make_simulator: MakeSimulator, execute: int | None = None) -> None:
        self._make_simulator, self._execute = make_simulator, execute
        self._simulators: OrderedDict[tuple[str, str], Simulator] = OrderedDict()

    def run(self, job: EpisodeJob) -> EpisodeResult:
        name = episode_id(job.spec)
        recorder = VideoRecorder() if job.video else None
        try:
            simulator = self._simulator(job.spec)
            result = run_episode(simulator, job.spec, self._act(job), [recorder] if recorder else [])
        except Exception:
            self._drop(job.spec)  # its state is unknown
            raise
        finally:
            job.policy.end(name)
        if recorder is None or job.video is None:
            return result
        return replace(result, video=str(recorder.save(job.video)))

    def _act(self, job: EpisodeJob) -> Act:
        name, execute = episode_id(job.spec), self._execute

        def act(observation: Observation, policy_step: int) -> Chunk:
            chunk = job.policy.act(name, observation, policy_step)
            if execute is not None and len(chunk) < execute:
                raise InvalidActionError(
                    f"{job.spec.key}: the policy gives {len(chunk)} actions per call, the protocol plays "
                    f"{execute}; evaluate a policy that executes as many, or by another protocol"
                )
            return chunk[:execute]

        return act

    def _simulator(self, spec: EpisodeSpec) -> Simulator:
        key = (spec.suite, spec.task)
        if key not in self._simulators:
            self._simulators[key] = self._make_simulator(*key)
        self._simulators.move_to_end(key)
        if len(self._simulators) > _OPEN_SIMULATORS:
            self._simulators.popitem(last=False)[1].close()
        return self._simulators[key]

    def _drop(self, spec: EpisodeSpec) -> None:
        simulator = self._simulators.pop((spec.suite, spec.task), None)
        if simulator is not None:
            simulator.close()
