"""A suite's scripted expert in a policy's place: the same episodes, journal and statistics, without a model.

It sees the true state, so it runs in the simulator's process and needs no pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipvla.contract import Contract
from ipvla.rollout.endpoint import Service, Serving
from ipvla.rollout.episode import Act, Chunk, EpisodeId
from ipvla.sim.expert import Expert
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.suite import SuiteEntry
from ipvla.sim.suites import suite_entry, suites_with_expert
from ipvla.types import EpisodeSpec, Observation


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
        begun: list[Expert] = []

        def act(_: Observation, policy_step: int) -> Chunk:
            if not begun:  # not before the episode has
                begun.append(solve(simulator.simulator, spec.seed))
            return begun[0].act().astype(np.float32)[None]

        return act

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
        return offered.in_environment_units

    def serve(self, serving: Serving, running: Service | None = None) -> ExpertService:
        """Nothing is started: it plays in the simulator's process."""
        if running is not None:
            running.close()
        view = None if serving.offered is None else self.view(serving.offered, serving.world)
        return ExpertService(self, view)


class ExpertService:
    """In place of a `PolicyService`; there is nothing to start or to replace."""

    def __init__(self, source: ExpertSource, view: Contract | None = None) -> None:
        self._client, self.view = ExpertClient(source.cache_dir, source.entry), view

    def client(self) -> ExpertClient:
        return self._client

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
