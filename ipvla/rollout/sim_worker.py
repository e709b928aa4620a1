"""Plays episodes in one process: its simulators stay open, and the policy actor answers with actions."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ipvla.contract import Contract
from ipvla.rollout.chunk_player import Pace
from ipvla.rollout.episode import Answer, Chunk, EpisodeId, ReplayError, replay_episode, run_episode
from ipvla.rollout.expert_policy import ExpertClient
from ipvla.rollout.recorder import VideoRecorder
from ipvla.sim.environment import SimulatorError
from ipvla.sim.perturbations import PerturbationConfig
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.protocols import PROTOCOLS, EvaluationProtocol
from ipvla.sim.simulator import Simulator
from ipvla.sim.suite import SuiteEntry, SuiteFacts
from ipvla.sim.suites import known_entry, suite_entry
from ipvla.types import EpisodeResult, EpisodeSpec, Observation

#: (suite, task) -> Simulator; picklable.
MakeSimulator = Callable[[str, str], Simulator]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuiteSimulators:
    """Opens the simulators of the suites by name, under a protocol.

    Attributes:
        cache_dir: directory of the suites' files.
        camera_size: side of rendered pictures in pixels, where the protocol leaves it open.
        protocol: how they are played.
        profile: how pictures are drawn, of `ipvla.sim.suites.PROFILES`.
        perturbation: of every episode; None for none.
        entry: the suite, where it has settings in place of a name.
    """

    cache_dir: Path
    camera_size: int = 64
    protocol: EvaluationProtocol = PROTOCOLS["recall"]
    profile: str = "exact"
    perturbation: PerturbationConfig | None = None
    entry: SuiteEntry | None = None

    def __call__(self, suite: str, task: str) -> ProtocolSimulator:
        protocol, opened = self.protocol, (self.entry or suite_entry(suite)).load(self.cache_dir)
        size, terms = protocol.render_size or self.camera_size, opened.facts.contract
        cameras = terms.cameras if terms is not None and not protocol.cameras else protocol.cameras
        simulator = opened.simulator(task, size, cameras, self.profile, protocol.world_seed)
        if self.perturbation is not None:
            assert opened.perturb is not None, "who evaluates has asked the suite's facts"
            opened.perturb(simulator, self.perturbation.build(suite))
        return ProtocolSimulator(simulator, protocol, suite)


class RemotePolicy(Protocol):
    """The policy as a worker sees it; `ipvla.rollout.policy_actor.PolicyClient` in production."""

    def act(self, episode_id: EpisodeId, observation: Observation, policy_step: int) -> Chunk | Answer: ...
    def end(self, episode_id: EpisodeId) -> None: ...


@dataclass(frozen=True)
class EpisodeJob:
    """One attempt at an episode.

    Attributes:
        view: the terms on which the policy plays; see `ProtocolSimulator.show`.
    """

    spec: EpisodeSpec
    policy: RemotePolicy | ExpertClient
    view: Contract | None = None


@dataclass(frozen=True)
class VideoJob:
    """The video of a recorded episode.

    Attributes:
        actions: float32 [T, A], of its trace.
        path: of the mp4.
        view: the terms on which the actions were given.
    """

    recorded: EpisodeResult
    actions: npt.NDArray[np.float32]
    path: Path
    view: Contract | None = None


def episode_id(spec: EpisodeSpec) -> EpisodeId:
    """The policy's name for this attempt."""
    return EpisodeId(spec.key, spec.attempt)


def _worlds(suite: str) -> int:
    """That a process holds open at a time; `SuiteFacts`' default for a suite that is known by its settings."""
    entry = known_entry(suite)
    return (SuiteFacts() if entry is None else entry.facts).worlds


def _unseen() -> Observation:
    """For an expert, which sees the true state: pictures would cost most of an episode's time."""
    return Observation({}, np.zeros(0, np.float32), "", 0)


class SimWorker:
    """A worker of `sim_pool.WorkerPool` for `EpisodeJob`s and `VideoJob`s.

    Args:
        make_simulator: opens a task's simulator.
        execute: actions of every chunk that are played before the policy is asked again; None for all.
        pace: how late answers come, and how one takes over from another; None for a world that waits.
    """

    def __init__(
        self, make_simulator: MakeSimulator, execute: int | None = None, pace: Pace | None = None
    ) -> None:
        self._make_simulator, self._execute, self._pace = make_simulator, execute, pace or Pace()
        self._simulators: OrderedDict[tuple[str, str], Simulator] = OrderedDict()

    def run(self, job: EpisodeJob | VideoJob) -> EpisodeResult | Path | None:
        """The episode's result; of a video its path, or None if the recorded actions lead elsewhere now."""
        return self._play(job) if isinstance(job, EpisodeJob) else self._record(job)

    def _play(self, job: EpisodeJob) -> EpisodeResult:
        try:
            simulator = self._simulator(job.spec, job.view)
            if isinstance(job.policy, ExpertClient):
                assert isinstance(simulator, ProtocolSimulator), "suites with an expert are played by a protocol"
                if not self._pace.plain:
                    raise ValueError("an expert sees the true state of now: no latency or chunking is its own")
                return run_episode(simulator, job.spec, job.policy.playing(simulator, job.spec), observe=_unseen)
            act = partial(job.policy.act, episode_id(job.spec))
            return run_episode(simulator, job.spec, act, execute=self._execute, pace=self._pace, terms=job.view)
        except Exception:
            self._drop(job.spec)  # its state is unknown
            raise
        finally:
            job.policy.end(episode_id(job.spec))

    def _record(self, job: VideoJob) -> Path | None:
        recorder = VideoRecorder(control_hz=job.view.control_hz if job.view else None)
        try:
            simulator = self._simulator(job.recorded.spec, job.view)
            replay_episode(simulator, job.recorded, job.actions, [recorder])
        except ReplayError as error:
            _logger.warning("no video: %s", error)
            return None
        return recorder.save(job.path)

    def _simulator(self, spec: EpisodeSpec, view: Contract | None) -> Simulator:
        key = (spec.suite, spec.task)
        if key not in self._simulators:
            if len(self._simulators) >= _worlds(spec.suite):
                self._simulators.popitem(last=False)[1].close()
            self._simulators[key] = self._opened(*key)
        self._simulators.move_to_end(key)
        simulator = self._simulators[key]
        if isinstance(simulator, ProtocolSimulator):
            simulator.show(view)
        return simulator

    def _opened(self, suite: str, task: str) -> Simulator:
        try:
            return self._make_simulator(suite, task)
        except Exception as error:
            _logger.exception("%s/%s cannot be opened", suite, task)
            raise SimulatorError(
                f"the simulator of {suite}/{task} cannot be opened ({type(error).__name__}: {error}); "
                "`python -m ray_jobs.doctor` checks this machine"
            ) from error

    def _drop(self, spec: EpisodeSpec) -> None:
        simulator = self._simulators.pop((spec.suite, spec.task), None)
        if simulator is not None:
            simulator.close()
