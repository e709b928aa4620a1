"""Runs episodes in one process: keeps the simulators that it has opened, asks the policy actor for actions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from ipvla.rollout.episode import Chunk, run_episode
from ipvla.rollout.recorder import VideoRecorder
from ipvla.sim.simulator import Simulator
from ipvla.types import EpisodeResult, EpisodeSpec, Observation

#: (suite, task) -> Simulator; picklable.
MakeSimulator = Callable[[str, str], Simulator]
_OPEN_SIMULATORS = 4


@dataclass(frozen=True)
class SuiteSimulators:
    """Opens the simulators of the suites by name.

    Attributes:
        cache_dir: where a suite keeps the files that it generates.
        camera_size: pixels, of the images that the policy sees.
    """

    cache_dir: Path
    camera_size: int = 64

    def __call__(self, suite: str, task: str) -> Simulator:
        from ipvla.sim.suites import load_suite

        simulator: Simulator = load_suite(suite, self.cache_dir).simulator(task, self.camera_size)
        return simulator


class RemotePolicy(Protocol):
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
    """A worker of `sim_pool.WorkerPool` for `EpisodeJob`s."""

    def __init__(self, make_simulator: MakeSimulator) -> None:
        self._make_simulator = make_simulator
        self._simulators: OrderedDict[tuple[str, str], Simulator] = OrderedDict()

    def run(self, job: EpisodeJob) -> EpisodeResult:
        name = episode_id(job.spec)
        recorder = VideoRecorder() if job.video else None
        try:
            simulator = self._simulator(job.spec)
            result = run_episode(
                simulator, job.spec, partial(job.policy.act, name), [recorder] if recorder else []
            )
        except Exception:
            self._drop(job.spec)  # its state is unknown
            raise
        finally:
            job.policy.end(name)
        if recorder is None or job.video is None:
            return result
        return replace(result, video=str(recorder.save(job.video)))

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
