"""The expert's attempts: each is a job of its own, whose outcome stays on disk until the dataset is written."""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ipvla.files import write_text
from ipvla.sim.demonstration import Demonstration, Showing
from ipvla.sim.libero import CAMERA
from ipvla.sim.simulator import Simulator, Split
from ipvla.sim.suite import SuiteEntry
from ipvla.sim.suites import suite_entry
from ray_jobs.running.learner import LearnerConfig

#: Seeds of different collections cannot overlap: attempt i of seed s plays layout s * 10^6 + i of the train split.
ATTEMPTS_PER_SEED = 1_000_000
_AS_IT_IS = Showing()
_LEAST_SUCCESS_RATE = 0.1
_ATTEMPTS_BEFORE_JUDGING = 50


@dataclass(frozen=True)
class Attempt:
    """The `index`-th attempt at a task in a collection of this seed, or from the published initial states."""

    task: str
    index: int
    seed: int
    published: bool = False

    @property
    def layout(self) -> int:
        """The simulator's seed: of the train split, or of the initial state that has this index."""
        if self.published:
            return Split.HELD_OUT.seed(self.index)
        return Split.TRAIN.seed(self.seed * ATTEMPTS_PER_SEED + self.index)


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt.

    Attributes:
        steps: control steps played.
        cpu_s: CPU time of the simulator's process: reset, physics, pictures, expert.
    """

    success: bool
    steps: int
    cpu_s: float


def next_attempts(
    counts: Mapping[str, int], outcomes: Mapping[str, Mapping[int, Outcome]], seed: int, published: bool = False
) -> list[Attempt]:
    """The attempts that will suffice if they succeed as often as those so far; none if there are enough.

    Indices are used without gaps, so that the dataset does not depend on which attempts end first.

    Args:
        counts: task -> number of demonstrations.
        outcomes: task -> index -> outcome.

    Raises:
        RuntimeError: the expert hardly ever succeeds at a task; going on would never end.
    """
    jobs = []
    for task, count in counts.items():
        known = outcomes[task]
        successes = sum(outcome.success for outcome in known.values())
        if len(known) >= _ATTEMPTS_BEFORE_JUDGING and successes < _LEAST_SUCCESS_RATE * len(known):
            raise RuntimeError(f"the expert solved {task} in {successes} of {len(known)} attempts; it is broken")
        rate = max(successes, 1) / max(len(known), 1)
        end = max(known, default=-1) + 1
        gaps = [index for index in range(end) if index not in known]
        ahead = math.ceil(max(0, count - successes) / rate) - len(gaps)
        jobs += [Attempt(task, index, seed, published) for index in (*gaps, *range(end, end + ahead))]
    return jobs


class Staging:
    """The outcomes of a collection's attempts so far, and its demonstrations; any process may add to it.

    Args:
        directory: on storage that the driver and all simulators share.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(self, attempt: Attempt, outcome: Outcome, demonstration: Demonstration | None) -> None:
        """Records the attempt. The outcome comes last: where it is, the demonstration is whole."""
        if demonstration is not None:
            demonstration.save(self._path(attempt, "npz"))
        write_text(self._path(attempt, "json"), json.dumps(asdict(outcome)))

    def outcomes(self, task: str, seed: int) -> dict[int, Outcome]:
        """By index, of the attempts that are through."""
        paths = sorted((self.directory / task).glob("*.json"))
        outcomes = {int(path.stem): Outcome(**json.loads(path.read_text())) for path in paths}
        return {
            index: outcome
            for index, outcome in outcomes.items()
            if not outcome.success or self._path(Attempt(task, index, seed), "npz").exists()
        }

    def demonstration(self, attempt: Attempt) -> Demonstration:
        return Demonstration.load(self._path(attempt, "npz"))

    def _path(self, attempt: Attempt, kind: str) -> Path:
        return self.directory / attempt.task / f"{attempt.index:06d}.{kind}"


class Demonstrator:
    """A worker of `sim_pool.WorkerPool` for `Attempt`s: plays them and puts them in the staging area."""

    def __init__(
        self,
        staging: Path,
        suite: str | SuiteEntry,
        cache_dir: Path,
        camera_size: int,
        cameras: Sequence[str] = (CAMERA,),
        profile: str = "exact",
        showing: Showing = _AS_IT_IS,
        learner: LearnerConfig | None = None,
    ) -> None:
        self._staging = Staging(staging)
        entry = suite_entry(suite) if isinstance(suite, str) else suite
        self._suite = entry.load(cache_dir)
        assert self._suite.demonstrate is not None, "collect checks this before"
        self._demonstrate = self._suite.demonstrate
        if learner is not None:
            self._demonstrate = self._correcting(learner)
        self._camera_size, self._cameras, self._profile = camera_size, cameras, profile
        self._showing = showing
        self._simulators: OrderedDict[str, Simulator] = OrderedDict()

    def run(self, attempt: Attempt) -> Outcome:
        simulator = self._simulator(attempt.task)
        before = time.process_time()
        try:
            demonstration = self._demonstrate(simulator, attempt.layout, self._showing)
        except Exception:
            self._simulators.pop(attempt.task).close()  # its state is unknown
            raise
        cpu_s = time.process_time() - before
        outcome = Outcome(demonstration is not None, simulator.t, cpu_s)
        self._staging.add(attempt, outcome, demonstration)
        return outcome

    def _correcting(self, learner: LearnerConfig) -> Callable[[Simulator, int, Showing], Demonstration | None]:
        correct, contract = self._suite.correct, self._suite.facts.contract
        assert correct is not None, "collect checks this before"
        assert contract is not None, "of a suite with such an expert"
        lead = learner.build(contract, self._suite.name)
        return lambda simulator, seed, showing: correct(simulator, seed, showing, lead)

    def _simulator(self, task: str) -> Simulator:
        if task not in self._simulators:
            if len(self._simulators) == self._suite.facts.worlds:
                self._simulators.popitem(last=False)[1].close()
            simulator = self._suite.simulator(task, self._camera_size, self._cameras, self._profile)
            if self._suite.facts.contract is not None:
                simulator.reset(0)  # robosuite compiles in a process's first step: no cost of the attempt
                simulator.step(np.zeros(self._suite.facts.contract.action_size))
            self._simulators[task] = simulator
        self._simulators.move_to_end(task)
        return self._simulators[task]
