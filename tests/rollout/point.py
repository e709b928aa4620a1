"""A world and a policy small enough to reason about: the rollout's own tests need memory, seeds and chunks.

The world shows a number once, at its reset; the policy must add it to what it sees later, so an action is right
only if the episode has its own memory. Simulators need no torch, so it is imported where a policy is opened: every
simulator's process would otherwise take a second longer to start.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipvla.sim.simulator import StepOutcome, Task
from ipvla.types import Observation

HORIZON = 12


class PointSimulator:
    """1-D: the cue `seed % 3 - 1` is seen at t = 0 only; moving by 0.1 towards it until |x| > 0.45 decides."""

    def __init__(self, name: str) -> None:
        self.task = Task(name, family=name.partition("_")[0], phrasings=("go",), horizon=HORIZON, chance=1 / 3)
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.cue, self.x, self.t = seed % 3 - 1, 0.0, 0
        self.track = []

    def step(self, action) -> StepOutcome:
        self.x += 0.1 * float(np.clip(action[0], -1, 1))
        self.t += 1
        self.track.append(round(self.x, 6))
        there = abs(self.x) > 0.45
        return StepOutcome(success=there and self.x * self.cue > 0, failure=there and self.x * self.cue <= 0)

    def observe(self, geometry: bool = False) -> Observation:
        cue = self.cue if self.t == 0 else 0.0
        return Observation({}, np.array([self.x, cue], np.float32), "go", self.t)

    def frame(self, size: int = 256):
        return np.full((size, size, 3), int(127 + 100 * self.x), np.uint8)

    def state(self):
        return {}

    def restore(self, state) -> None: ...

    def details(self):
        return {"track": self.track}

    def close(self) -> None: ...


class PointPolicy:
    """Remembers the cue (its memory is the running sum of what it saw) and moves there, two actions at a time."""

    execute = 2

    def initial_memory(self, batch: int):
        import torch

        return {"cue": torch.zeros(batch, 1), "steps": torch.zeros(batch, dtype=torch.int64)}

    def act(self, observations, memory):
        import torch

        seen = torch.tensor(np.stack([o.proprio for o in observations]))
        cue = memory["cue"] + seen[:, 1:]
        actions = cue[:, None, :].expand(-1, 3, -1)
        return actions.numpy().astype(np.float32), {"cue": cue, "steps": memory["steps"] + 1}


class RecurrentPolicy:
    """A torch GRU with fixed random weights."""

    execute = 2

    def __init__(self) -> None:
        import torch

        torch.manual_seed(0)
        self.cell, self.head = torch.nn.GRUCell(2, 16), torch.nn.Linear(16, 3)

    def initial_memory(self, batch: int):
        import torch

        return {"h": torch.zeros(batch, 16)}

    def act(self, observations, memory):
        import torch

        h = self.cell(torch.tensor(np.stack([o.proprio for o in observations])), memory["h"])
        return self.head(h)[..., None].numpy(), {"h": h}


def first_time(marker: Path) -> bool:
    """Of all processes and calls, for this marker."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def kill_me_once(marker: Path) -> None:
    """SIGKILL to the calling process, the first time for this marker."""
    if first_time(marker):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Points:
    """Makes simulators; the one that reaches the 5th step of seed `kill_at`, or `hang_at`, does so once."""

    marker: Path | None = None
    kill_at: int = -1
    hang_at: int = -1
    broken: str = ""

    def __call__(self, suite: str, task: str) -> PointSimulator:
        if task == self.broken:
            raise RuntimeError("the scene does not compile")
        simulator = PointSimulator(task)
        if self.marker is None:
            return simulator
        reset, step = simulator.reset, simulator.step

        def watched_reset(seed: int) -> None:
            simulator.seed = seed
            reset(seed)

        def watched_step(action) -> StepOutcome:
            if simulator.seed == self.kill_at and simulator.t == 4:
                kill_me_once(self.marker)
            if simulator.seed == self.hang_at and simulator.t == 4 and first_time(self.marker):
                time.sleep(3600)
            return step(action)

        simulator.reset, simulator.step = watched_reset, watched_step
        return simulator


def load_point(directory: Path) -> PointPolicy:
    return PointPolicy()


def load_fixed_left(directory: Path) -> PointPolicy:
    """A policy without memory: it always goes left."""

    class Left(PointPolicy):
        def initial_memory(self, batch: int):
            return {}

        def act(self, observations, memory):
            return -np.ones((len(observations), 3, 1), np.float32), {}

    return Left()


def load_dying(directory: Path) -> PointPolicy:
    """A policy whose process is killed once, in its 12th forward pass."""

    class Dying(PointPolicy):
        calls = 0

        def act(self, observations, memory):
            Dying.calls += 1
            if Dying.calls == 12:
                kill_me_once(directory / "killed")
            return super().act(observations, memory)

    return Dying()


def load_dying_at_birth(directory: Path) -> PointPolicy:
    """A policy whose process is killed while it loads, the first time."""
    kill_me_once(directory / "killed")
    return PointPolicy()


def load_unlucky(directory: Path) -> PointPolicy:
    """A policy that fails once, in its 12th forward pass (out of memory, say), and is well again."""

    class Unlucky(PointPolicy):
        calls = 0

        def act(self, observations, memory):
            Unlucky.calls += 1
            if Unlucky.calls == 12:
                raise MemoryError("no room for this batch")
            return super().act(observations, memory)

    return Unlucky()


LATE_S = 120


def load_dying_then_late(directory: Path) -> PointPolicy:
    """As `load_dying`, and takes long to load the third time."""
    if not any(first_time(directory / f"loaded-{n}") for n in range(2)):
        time.sleep(LATE_S)
    return load_dying(directory)


def load_stillborn(directory: Path) -> PointPolicy:
    """A policy that no process survives."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def load_buggy(directory: Path) -> PointPolicy:
    class Buggy(PointPolicy):
        def act(self, observations, memory):
            raise ZeroDivisionError("a bug in the model")

    return Buggy()


def load_nothing(directory: Path) -> PointPolicy:
    raise ValueError("no such policy")
