"""The actions of an episode and the time that each step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.sim.simulator import StepOutcome
from ipvla.types import EpisodeResult, EpisodeSpec, EpisodeTrace


class EpisodeLog:
    """Starts with the episode; `answer` and `step` time the block inside them."""

    def __init__(self) -> None:
        self._began_s, self._cpu_began_s = time.perf_counter(), time.process_time()
        self._asking_cpu_s = 0.0
        self._actions: list[npt.NDArray[np.float32]] = []
        self._step_s: list[float] = []
        self._asked_t: list[int] = []
        self._answer_s: list[float] = []

    @property
    def steps(self) -> int:
        """Control steps so far."""
        return len(self._actions)

    @property
    def policy_steps(self) -> int:
        """Answers so far."""
        return len(self._asked_t)

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Times the policy's answer."""
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self._answer_s.append(time.perf_counter() - began)
        self._asked_t.append(self.steps)
        self._asking_cpu_s += time.process_time() - cpu_began

    @contextmanager
    def step(self, action: npt.NDArray[np.float32]) -> Iterator[None]:
        """Times the simulator's step with this action, [A]."""
        began = time.perf_counter()
        yield
        self._step_s.append(time.perf_counter() - began)
        self._actions.append(action)

    def result(self, spec: EpisodeSpec, outcome: StepOutcome, details: Mapping[str, Any]) -> EpisodeResult:
        """The record of the episode, which ends now."""
        return EpisodeResult(
            spec=spec,
            outcome=outcome.verdict,
            steps=self.steps,
            policy_steps=self.policy_steps,
            wall_s=time.perf_counter() - self._began_s,
            policy_s=sum(self._answer_s),
            sim_cpu_s=time.process_time() - self._cpu_began_s - self._asking_cpu_s,
            details=dict(details),
            trace=EpisodeTrace(
                actions=np.array(self._actions, np.float32),
                step_s=np.array(self._step_s, np.float32),
                asked_t=np.array(self._asked_t, np.int32),
                answer_s=np.array(self._answer_s, np.float32),
            ),
        )
