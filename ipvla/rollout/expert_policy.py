"""A suite's scripted expert in a policy's place: the same episodes, journal and statistics, without a model.

It sees the true state, so it runs in the simulator's process and needs no pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from ipvla.contract import Contract
from ipvla.rollout.endpoint import ClientService, Service, Serving
from ipvla.rollout.episode import Act, EpisodeId
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.suite import SuiteEntry
from ipvla.sim.suites import suite_entry, suites_with_expert
from ipvla.types import EpisodeSpec


@dataclass(frozen=True)
class ExpertClient:
    """The simulator worker's client, in place of a `PolicyClient`; `entry` as in `SuiteSimulators`."""

    cache_dir: Path
    entry: SuiteEntry | None = None

    def playing(self, simulator: ProtocolSimulator, spec: EpisodeSpec) -> Act:
        """Actions of the expert, one at a time, for the episode that `simulator` is about to begin.

        Raises:
            ValueError: its suite has none.
        """
        solve = (self.entry or suite_entry(spec.suite)).load(self.cache_dir).expert
        if solve is None:
            raise ValueError(
                f"{spec.suite} has no scripted expert; choose one of {', '.join(suites_with_expert())}"
            )
        expert = cache(partial(solve, simulator.simulator, spec.seed))  # begins when the episode has begun
        return lambda _, policy_step: expert().act().astype(np.float32)[None]

    def end(self, episode_id: EpisodeId) -> None:
        """There is nothing to free."""


@dataclass(frozen=True)
class ExpertSource:
    """The source of an expert, in place of a `PolicySource`; `entry` as in `SuiteSimulators`."""

    cache_dir: Path
    entry: SuiteEntry | None = None

    def sha256(self) -> str:
        """Of the source code of `ipvla.sim`."""
        from ipvla import sim

        files = sorted(path for path in Path(sim.__path__[0]).rglob("*.py"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    def view(self, offered: Contract, world: str = "the world") -> Contract:
        """It looks at no picture, and acts in the simulator's units."""
        return offered.in_environment_units.pictures_alone

    def serve(self, serving: Serving, running: Service | None = None) -> ClientService:
        """It plays in the simulator's process."""
        if running is not None:
            running.close()
        return ClientService(partial(ExpertClient, self.cache_dir, self.entry), serving.view(self))
