"""What is recorded of an episode: its actions, the time that each step takes, and a video."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.files import replacing
from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import EpisodeResult, EpisodeSpec, EpisodeTrace

_CONTROL_HZ = 20


class EpisodeLog:
    """Starts with the episode; `answer` and `step` time the block inside them."""

    def __init__(self) -> None:
        self._began_s, self._cpu_began_s = time.perf_counter(), time.process_time()
        self._asking_cpu_s = 0.0
        self._actions: list[npt.NDArray[np.float32]] = []
        self._step_s: list[float] = []
        self._asked_t: list[int] = []
        self._answer_s: list[float] = []
        self._latency: list[int] = []
        self._call: list[int] = []
        self._thought_t: list[int] = []

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

    def late(self, latency: int) -> None:
        """Notes after how many control steps the latest answer is there."""
        self._latency.append(latency)

    def thought(self, t: int) -> None:
        """Notes on which control step's observation the thought behind the latest answer rests."""
        self._thought_t.append(t)

    @contextmanager
    def step(self, action: npt.NDArray[np.float32], call: int | None = None) -> Iterator[None]:
        """Times the simulator's step with this action, [A], of this call's answer; None where it keeps still."""
        began = time.perf_counter()
        yield
        self._step_s.append(time.perf_counter() - began)
        self._actions.append(action)
        self._call.append(-1 if call is None else call)

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
                latency=np.array(self._latency, np.int32) if self._latency else None,
                call=np.array(self._call, np.int32) if self._latency else None,
                thought_t=np.array(self._thought_t, np.int32) if self._thought_t else None,
            ),
        )


class VideoRecorder:
    """An observer that renders every `every`-th control step, and the last one, at `size` x `size` pixels.

    Args:
        size: a multiple of 16 (the encoder's block).
        every: control steps per frame.
        control_hz: control steps per second; None where nothing says it, for LIBERO's 20.
    """

    def __init__(self, size: int = 128, every: int = 2, control_hz: float | None = None) -> None:
        if size < 16 or size % 16:
            raise ValueError(f"video size {size} is not a positive multiple of 16 pixels; use e.g. 128")
        if every < 1:
            raise ValueError(f"a frame every {every} control steps is not possible; use every >= 1")
        self._size, self._every, self._control_hz = size, every, control_hz or _CONTROL_HZ
        self._steps = 0
        self.frames: list[npt.NDArray[np.uint8]] = []

    def on_reset(self, simulator: Simulator) -> None:
        self._steps, self.frames = 0, [simulator.frame(self._size)]

    def on_step(self, simulator: Simulator, action: npt.NDArray[np.float32], outcome: StepOutcome) -> None:
        self._steps += 1
        if self._steps % self._every == 0 or outcome.done:
            self.frames.append(simulator.frame(self._size))

    def save(self, path: Path) -> Path:
        """Writes the mp4 at real-time speed; the file appears whole or not at all."""
        import imageio_ffmpeg

        with replacing(path) as part:
            writer = imageio_ffmpeg.write_frames(
                str(part),
                (self._size, self._size),
                fps=self._control_hz / self._every,
                ffmpeg_log_level="error",
                output_params=["-f", "mp4"],
            )
            writer.send(None)
            for frame in self.frames:
                writer.send(np.ascontiguousarray(frame))
            writer.close()
        return path
