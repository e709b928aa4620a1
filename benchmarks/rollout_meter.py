"""A simulator that keeps its CPU time: what of an evaluation's time is physics and asked-for frames."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import Observation


class MeteredSimulator:
    """The simulator, whose `details` also have `physics_cpu_s` and `frames_cpu_s` of the episode.

    Physics is what this thread spends in `reset` and `step`. Frames are what the process spends in `observe`: the
    renderer has a thread of its own.
    """

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._physics_s = self._frames_s = 0.0

    def reset(self, seed: int) -> None:
        self._physics_s = self._frames_s = 0.0
        with self._physics():
            self._simulator.reset(seed)

    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome:
        with self._physics():
            return self._simulator.step(action)

    def observe(self) -> Observation:
        began_s = time.process_time()
        try:
            return self._simulator.observe()
        finally:
            self._frames_s += time.process_time() - began_s

    def details(self) -> Mapping[str, Any]:
        spent = {"physics_cpu_s": self._physics_s, "frames_cpu_s": self._frames_s}
        return {**self._simulator.details(), **spent}

    @contextmanager
    def _physics(self) -> Iterator[None]:
        began_s = time.thread_time()
        yield
        self._physics_s += time.thread_time() - began_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator, name)


@dataclass(frozen=True)
class MeteredSimulators:
    """Opens simulators that are metered below their protocol, whose pictures' preparation is so not counted."""

    simulators: SuiteSimulators

    def __call__(self, suite: str, task: str) -> Simulator:
        opened = self.simulators(suite, task)
        assert isinstance(opened, ProtocolSimulator)
        metered = cast(Simulator, MeteredSimulator(opened.simulator))
        return ProtocolSimulator(metered, self.simulators.protocol, suite)
