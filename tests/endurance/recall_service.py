"""What chaos and soak play: short episodes of the embedded suite's real simulators, by a real policy.

The policy is untrained: its every action depends on pictures and memory, which is all that is compared here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.rollout_speed import save_untrained_policy
from benchmarks.rollout_stub import EXECUTE
from ipvla.policy import Policy
from ipvla.rollout.endpoint import Serving
from ipvla.rollout.evaluation import SimPool
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Split
from ipvla.sim.suites import load_suite
from ipvla.types import EpisodeSpec

_SUITE = "recall"
#: For Ray to end the processes of actors that it has to kill.
_ENDING_S = 20.0


@dataclass(frozen=True)
class RecallService:
    """The service with its simulators and replicas.

    Attributes:
        cache_dir: of the suite's files.
        policy: a directory that is written.
        horizon: control steps of an episode.
    """

    cache_dir: Path
    policy: Path
    horizon: int
    num_simulators: int
    replicas: int = 1

    @contextmanager
    def running(self) -> Iterator[tuple[SimPool, PolicyService]]:
        """Ends all of its processes at last. Forward passes have one row, so that episodes can be compared."""
        protocol = replace(load_protocol("recall"), horizons={_SUITE: self.horizon})
        save_untrained_policy(self.policy, protocol.cameras)
        policy = PolicyService(
            PolicySource(Policy.load, self.policy), Serving(replicas=self.replicas, max_batch=1)
        )
        simulators = SuiteSimulators(self.cache_dir, protocol=protocol)
        try:
            with SimPool(simulators, self.num_simulators, execute=EXECUTE, cpus_per_simulator=0) as pool:
                yield pool, policy
        finally:
            policy.close()

    def specs(self, tasks: int, episodes: int) -> list[EpisodeSpec]:
        """So many episodes, shared among the suite's first tasks."""
        names = [task.name for task in load_suite(_SUITE, self.cache_dir).tasks[:tasks]]
        return [
            EpisodeSpec(_SUITE, names[i % tasks], Split.HELD_OUT.seed(i // tasks), i // tasks)
            for i in range(episodes)
        ]


def actors(driver: psutil.Process | None = None) -> dict[psutil.Process, str]:
    """The processes of a job's simulators and replicas, by what they are; by default this one's."""
    kinds = {"ray::_Host": "simulator", "ray::PolicyActor": "policy"}
    try:
        below = (driver or psutil.Process()).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    titles = {process: _title(process) for process in below}
    return {
        process: kind
        for process, title in titles.items()
        for mark, kind in kinds.items()
        if title.startswith(mark)
    }


def left_behind(patience_s: float = _ENDING_S) -> int:
    """Simulators and replicas that still live although their service is closed."""
    deadline = time.monotonic() + patience_s
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(actors())


def service_processes() -> dict[psutil.Process, str]:
    """`actors`, and what stands behind them: this process, and Ray's own."""
    own = {"raylet": "raylet", "gcs_server": "gcs"}
    children = psutil.Process().children(recursive=True)
    rays = {process: own[name] for process in children if (name := _name(process)) in own}
    return {psutil.Process(): "driver", **actors(), **rays}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""
