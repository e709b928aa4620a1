"""Collects demonstrations of a suite's scripted expert into an RLDS dataset.

Each task gets exactly the number of successful demonstrations that was asked for: the first ones in the order of
their seeds, whatever the number of simulators. An interrupted collection goes on where it stopped.

    python -m ray_jobs.collect --config_path ray_jobs/experiments/quickstart/full/collect.yaml
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ipvla.data.recording import Recording
from ipvla.data.rlds import dataset_directory, write_rlds
from ipvla.data.source import DatasetError
from ipvla.files import locked, write_text
from ipvla.rollout.sim_pool import WorkerPool, cluster_cores, cluster_room
from ipvla.sim.demonstration import Demonstration, Showing
from ipvla.sim.environment import require_simulators
from ipvla.sim.fingerprint import fingerprint
from ipvla.sim.libero import CAMERA
from ipvla.sim.simulator import Split
from ipvla.sim.suite import Suite, SuiteEntry, SuiteFacts
from ipvla.sim.suites import SETTINGS, known_entry, require_expert, suite_entry
from ipvla.storage import StorageRoots
from ray_jobs.command_line.cli import run
from ray_jobs.running.attempts import ATTEMPTS_PER_SEED, Attempt, Demonstrator, Outcome, Staging, next_attempts
from ray_jobs.running.cluster import connect, require_free_port
from ray_jobs.running.display import CollectionDisplay, TaskProgress
from ray_jobs.running.learner import LearnerConfig

#: Of requests that were recorded before these could be chosen.
_BEFORE = {
    "cameras": [CAMERA],
    "profile": "exact",
    "initial_states": "drawn",
    "drawing": 1,
    "showing": Showing().to_dict(),
}
_SEEDS = Split.HELD_OUT.value // ATTEMPTS_PER_SEED


@dataclass(frozen=True)
class CollectConfig(StorageRoots):
    """What to collect.

    Attributes:
        suite: whose tasks: by name, or `gym:PATH.yaml`, see `ipvla.sim.gym.settings`.
        dataset: the name that the dataset gets under `data_root_dir`.
        demonstrations: task -> number of successful demonstrations; tasks that are absent or 0 are left out.
        seed: of the layouts; datasets of different seeds share none.
        num_simulators: simulators run side by side; by default one per CPU of the cluster.
        camera_size: side of the pictures in pixels.
        cameras: that are recorded, by MuJoCo's names: agentview, and for LIBERO's suites robot0_eye_in_hand; null
            for agentview, or all that a settings file names.
        profile: how they are drawn, see `ipvla.sim.suite.PROFILES`.
        initial_states: "drawn" anew for every demonstration, or "published": one demonstration from each initial
            state that evaluations play, in their order; the expert must solve as many as are asked for.
        learner: a trained policy that plays the first steps of every episode, which the expert then corrects.
        showing: how often pictures are drawn, and from how far away the hand begins; whether depth, intrinsics and
            pose are recorded.
        dashboard_port: where to serve Ray's dashboard of a local cluster; by default there is none.
    """

    suite: str = "recall"
    dataset: str = "recall"
    demonstrations: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    num_simulators: int | None = None
    camera_size: int = 64
    cameras: tuple[str, ...] | None = None
    profile: str = "exact"
    initial_states: str = "drawn"
    showing: Showing = field(default_factory=Showing)
    learner: LearnerConfig | None = None
    dashboard_port: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.dataset):
            raise ValueError(
                f"dataset: {self.dataset!r} is no name for a dataset; use lower case letters, digits and _"
            )
        require_expert(self.suite, "suite")
        for task, count in self.demonstrations.items():
            if count < 0:
                raise ValueError(f"demonstrations.{task}: {count} is negative; ask for 0 or more")
        if not any(self.demonstrations.values()):
            raise ValueError("demonstrations: none are asked for; give for example --demonstrations.recall 100")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed: {self.seed} is outside [0, {_SEEDS}); choose one inside")
        if self.num_simulators is not None and self.num_simulators < 1:
            raise ValueError(
                f"num_simulators: {self.num_simulators} simulators cannot collect anything; give 1 or more"
            )
        if self.camera_size < 1:
            raise ValueError(f"camera_size: {self.camera_size} is not positive; give the picture's side in pixels")
        if self.initial_states not in ("drawn", "published"):
            raise ValueError(f'initial_states: {self.initial_states!r} is neither "drawn" nor "published"')
        if (entry := known_entry(self.suite)) is not None:
            self._check_views(entry.facts)

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras that are recorded."""
        entry = known_entry(self.suite)
        terms = entry.facts.contract if entry is not None and entry.facts.settings else None
        return self.cameras if self.cameras is not None else (CAMERA,) if terms is None else terms.cameras

    def _check_views(self, facts: SuiteFacts) -> None:
        views = self.views
        known = facts.contract.cameras if facts.contract is not None else views
        if not views or set(views) - set(known) or len(set(views)) < len(views):
            raise ValueError(f"cameras: {list(views)}; name some of {list(known)}, each once")
        if self.profile not in facts.profiles:
            raise ValueError(f"profile: {self.profile!r}; {self.suite} is drawn {' or '.join(facts.profiles)}")
        if self.showing.geometry and (facts.contract is None or not facts.contract.geometry):
            raise ValueError(f"showing.geometry: {self.suite} gives no depth; set it to false")
        if self.initial_states == "published" and not facts.publishes_states:
            raise ValueError(
                f"initial_states: {self.suite} has no published ones, and held-out layouts are for evaluations; "
                'choose "drawn"'
            )
        if self.learner is not None and not facts.takes_over:
            raise ValueError(
                f"learner: the expert of {self.suite} cannot take over in the middle of an episode; set it to null"
            )

    @property
    def directory(self) -> Path:
        """Of the dataset."""
        return dataset_directory(self.datasets, self.dataset)

    @property
    def record(self) -> Path:
        """How the dataset was made, beside it."""
        return self.datasets / self.dataset / "collection.json"

    @property
    def staging(self) -> Path:
        """Where attempts wait until there are enough."""
        return self.runs / "collect" / self.dataset

    def counts(self, suite: Suite) -> dict[str, int]:
        """Task -> number, in the suite's order, tasks that it does not list last. ValueError if it lacks one."""
        for task in self.demonstrations:
            suite.task(task)
        listed = [task.name for task in suite.tasks if task.name in self.demonstrations]
        names = dict.fromkeys([*listed, *self.demonstrations])
        return {task: self.demonstrations[task] for task in names if self.demonstrations[task]}


@dataclass(frozen=True)
class CollectSummary:
    """The result of a collection.

    Attributes:
        demos: in the dataset.
        control_steps: played in all attempts, the failed ones too.
        cpu_ms_per_step: CPU time of simulator, pictures and expert per control step, over all attempts.
        wall_s: from start to finish of the run that wrote the dataset.
        directory: the dataset's.
    """

    demos: int
    control_steps: int
    cpu_ms_per_step: float
    wall_s: float
    directory: Path


OnProgress = Callable[[Sequence[TaskProgress]], None]


def collect(config: CollectConfig, on_progress: OnProgress = lambda tasks: None) -> CollectSummary:
    """Collects what is missing and writes the dataset; one that is complete already is returned at once.

    Args:
        on_progress: called after every attempt with one record per task.

    Raises:
        ValueError: the suite or a task does not exist.
        DatasetError: a dataset of this name exists with another request, or is being collected.
        StorageError: a storage directory cannot be used.
        JobFailedError: an attempt crashed its simulator again and again.
    """
    started = time.monotonic()
    require_simulators()
    entry = suite_entry(config.suite)
    suite = entry.load(config.cache)
    counts = config.counts(suite)
    if config.learner is not None and suite.facts.contract is not None:
        config.learner.check(suite.facts.contract, config.views, config.suite)
    request = _request(config, suite, counts)
    if config.directory.exists():
        return _finished(config, request)
    suite.facts.inspect()
    if config.dashboard_port is not None:
        require_free_port(config.dashboard_port, "dashboard_port")
    config.prepare(writes=("data_root_dir",))
    with _alone(config.staging):
        if config.directory.exists():  # by a process that has just finished
            return _finished(config, request)
        _refuse_other_attempts(config, request)
        with connect(config, dashboard_port=config.dashboard_port):
            write_text(config.staging / "request.json", json.dumps(request))
            staging = Staging(config.staging / "attempts")
            _attempt_all(config, entry, staging, counts, on_progress)
        summary = _write(config, staging, suite, counts, request, started)
        shutil.rmtree(config.staging)
    return summary


def _request(config: CollectConfig, suite: Suite, counts: dict[str, int]) -> dict[str, Any]:
    """Everything that decides the dataset's contents, as JSON has it."""
    return {
        "suite": suite.name,
        "suite_version": suite.version,
        "seed": config.seed,
        "camera_size": config.camera_size,
        "demonstrations": counts,
        "cameras": list(config.views),
        "profile": config.profile,
        "initial_states": config.initial_states,
        "drawing": suite.facts.drawing if config.initial_states == "drawn" else _BEFORE["drawing"],
        "showing": config.showing.to_dict(),
        "learner": config.learner and config.learner.identity,
    }


def _finished(config: CollectConfig, request: dict[str, Any]) -> CollectSummary:
    if not config.record.exists():
        raise DatasetError(
            f"dataset: {config.directory} exists and was not made by ray_jobs.collect; "
            "choose another --dataset, or delete that directory"
        )
    record = json.loads(config.record.read_text())
    _refuse_difference(config.directory, record["request"], request)
    return CollectSummary(**record["summary"], directory=config.directory)


def _refuse_difference(directory: Path, recorded: dict[str, Any], request: dict[str, Any]) -> None:
    for name, value in request.items():
        before = recorded.get(name, _BEFORE.get(name))
        if before != value:
            raise DatasetError(
                f"{name}: {directory} was collected with {before}, not {value}; "
                "ask for the same, choose another --dataset, or delete that directory"
            )


@contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """One collection of a dataset at a time; the kernel drops the lock when its holder dies."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(staging.with_suffix(".lock"), wait=False))
        except BlockingIOError:
            raise DatasetError(
                f"dataset: {staging.name!r} is being collected by another process; wait, or change --dataset"
            ) from None
        yield


def _refuse_other_attempts(config: CollectConfig, request: dict[str, Any]) -> None:
    """What an interrupted collection left must fit; only the numbers of demonstrations may have changed."""
    path = config.staging / "request.json"
    if path.exists():
        rest = {name: value for name, value in request.items() if name != "demonstrations"}
        _refuse_difference(config.staging, json.loads(path.read_text()), rest)


def _attempt_all(
    config: CollectConfig, entry: SuiteEntry, staging: Staging, counts: dict[str, int], on_progress: OnProgress
) -> None:
    """Attempts in rounds, each as large as needed if all succeed at the rate so far, until there are enough."""
    outcomes = {task: staging.outcomes(task, config.seed) for task in counts}
    published = config.initial_states == "published"
    jobs = next_attempts(counts, outcomes, config.seed, published)
    on_progress(_progress(counts, outcomes))
    if not jobs:
        return
    views = (config.camera_size, config.views, config.profile, config.showing, config.learner)
    suite = entry if entry.facts.settings else entry.name
    make = partial(Demonstrator, staging.directory, suite, config.cache, *views)
    simulators = config.num_simulators or min(cluster_cores(), cluster_room(entry.facts.simulator_bytes))
    variables, python = entry.facts.environment(), entry.facts.python
    with WorkerPool(make, simulators, job_timeout_s=300.0, environment=variables, python=python) as pool:
        while jobs:
            for attempt, outcome in pool.map(jobs, group=lambda job: job.task):
                outcomes[attempt.task][attempt.index] = outcome
                on_progress(_progress(counts, outcomes))
            jobs = next_attempts(counts, outcomes, config.seed, published)


def _progress(counts: dict[str, int], outcomes: dict[str, dict[int, Outcome]]) -> list[TaskProgress]:
    solved = {task: sum(outcome.success for outcome in outcomes[task].values()) for task in counts}
    return [TaskProgress(task, min(solved[task], n), n, len(outcomes[task])) for task, n in counts.items()]


def _write(
    config: CollectConfig,
    staging: Staging,
    suite: Suite,
    counts: dict[str, int],
    request: dict[str, Any],
    started: float,
) -> CollectSummary:
    outcomes = {task: staging.outcomes(task, config.seed) for task in counts}
    every = [outcome for of_task in outcomes.values() for outcome in of_task.values()]
    steps = sum(outcome.steps for outcome in every)
    summary = CollectSummary(
        demos=sum(counts.values()),
        control_steps=steps,
        cpu_ms_per_step=1000 * sum(outcome.cpu_s for outcome in every) / steps,
        wall_s=time.monotonic() - started,
        directory=config.directory,
    )

    def demonstrations() -> Iterator[Demonstration]:
        for task, count in counts.items():
            solved = [index for index, outcome in sorted(outcomes[task].items()) if outcome.success]
            for index in solved[:count]:
                yield staging.demonstration(Attempt(task, index, config.seed))

    # Before the dataset: where it is, its record is too.
    record = {
        "request": request,
        "summary": {name: value for name, value in asdict(summary).items() if name != "directory"},
        "os": platform.platform(),
        "fingerprint": {**fingerprint(suite.facts.packages), **suite.facts.inspect()},
        **({SETTINGS: json.loads(suite.facts.settings)} if suite.facts.settings else {}),
    }
    write_text(config.record, json.dumps(record, indent=1))
    terms = suite.facts.contract
    recording = Recording(pictures_every=config.showing.pictures_every)
    if terms is not None:
        recording = replace(recording, orientation=terms.pictures.orientation, control_hz=terms.control_hz)
    if terms is not None and suite.facts.settings:
        recording = replace(recording, terms=terms)
    write_rlds(config.datasets, config.dataset, demonstrations(), config.camera_size, recording)
    return summary


def main(config: CollectConfig) -> None:
    """Collects, with progress on the terminal, and says what there is now."""
    complete = config.directory.exists()
    with CollectionDisplay() as display:
        summary = collect(config, display.update)
    if complete:
        print(f"The dataset is complete: {summary.demos} demonstrations in {summary.directory}")
        return
    print(
        f"{summary.demos} demonstrations in {summary.directory}: {summary.control_steps} control steps, "
        f"{summary.cpu_ms_per_step:.2f} CPU-ms each, {summary.wall_s:.0f} s"
    )


if __name__ == "__main__":
    run(CollectConfig, main, __doc__)
