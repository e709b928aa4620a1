"""Closed-loop success on held-out layouts, over a pool of simulators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Self

from evaluators.confidence_sequence import confidence_sequence
from evaluators.success_table import SuccessTable, tabulate
from ipvla.rollout.evaluation import SimPool, evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.rollout.oversubscription import MOST_PER_CORE, simulators_for
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.rollout.sim_pool import cluster_cores
from ipvla.rollout.sim_worker import MakeSimulator, SuiteSimulators
from ipvla.sim.fingerprint import fingerprint
from ipvla.sim.protocols import Protocol, load_protocol
from ipvla.sim.simulator import Split, Task
from ipvla.sim.suites import PROFILES, SUITES, Suite, load_suite
from ipvla.tracking import MetricSink, Sinks
from ipvla.types import EpisodeResult, EpisodeSpec

_REPLAYS = 3
#: For each simulator, where an evaluation may stop after every round.
_EPISODES_PER_ROUND = 4


@dataclass(frozen=True)
class SuccessConfig:
    """What is evaluated; `build` opens it.

    Attributes:
        suite: by name.
        protocol: by name, see `ipvla.sim.protocols`; by default "recall" for the embedded suite and "openvla" for
            LIBERO's own.
        profile: how pictures are drawn, "exact" or "fast" (`ipvla.sim.suites.PROFILES`).
        episodes: task -> number; trial i plays held-out layout i, the same for every policy. Empty for as many of
            every task of the suite as the protocol has trials.
        first_layout: the first trial of every task; another slice of layouts than those of earlier studies.
        stop_width: ends as soon as the mean over tasks is known to within an interval of this width that holds
            however often one looks (`evaluators.confidence_sequence`); None to play every episode.
        num_simulators: simulator actors; None for one per core of the cluster at first, and more of them if these
            wait for the policy.
        camera_size: side of rendered pictures in pixels, where the protocol leaves it open.
        max_attempts: runs of one episode before the evaluation gives up.
        policy_threads: CPU threads of the policy's forward pass.
        policy_resources: what a policy actor asks Ray for, such as {"num_gpus": 1}.
        policy_replicas: actors with the same policy; an episode keeps to one.
        policy_capacity: episodes that one of them keeps in memory at a time; None for as many as there are.
    """

    suite: str = "recall"
    protocol: str = ""
    profile: str = "exact"
    episodes: dict[str, int] = field(default_factory=dict)
    first_layout: int = 0
    stop_width: float | None = None
    num_simulators: int | None = 2
    camera_size: int = 64
    max_attempts: int = 3
    policy_threads: int = 1
    policy_resources: dict[str, float] = field(default_factory=dict)
    policy_replicas: int = 1
    policy_capacity: int | None = None

    def __post_init__(self) -> None:
        for name in ("camera_size", "max_attempts", "policy_threads", "policy_replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; pass {name} >= 1")
        for name in ("num_simulators", "policy_capacity"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; pass {name} >= 1, or null")
        for task, count in self.episodes.items():
            if count < 1:
                raise ValueError(f"episodes.{task} is {count}; ask for 1 or more, or leave the task out")
        if self.first_layout < 0:
            raise ValueError(f"first_layout is {self.first_layout}; pass first_layout >= 0")
        if self.stop_width is not None:
            if not 0 < self.stop_width < 1:
                raise ValueError(f"stop_width is {self.stop_width}; give the width of an interval, in (0, 1)")
            if len(set(self.episodes.values())) > 1:
                raise ValueError("stop_width needs as many episodes of every task; make `episodes` the same")
        if self.profile not in PROFILES:
            raise ValueError(f"profile is {self.profile!r}; choose among {', '.join(PROFILES)}")
        if self.suite in SUITES:
            self.played_by.horizon(self.suite, 1)  # one that does not cover the suite is told now

    @property
    def played_by(self) -> Protocol:
        return load_protocol(self.protocol or ("recall" if self.suite == "recall" else "openvla"))

    def simulators(self, cache_dir: Path) -> SuiteSimulators:
        """What opens the simulators of these episodes."""
        return SuiteSimulators(cache_dir, self.camera_size, self.played_by, self.profile)

    def build(self, cache_dir: Path) -> SuccessEvaluation:
        """Opens the suite; Ray is needed once episodes run. ValueError for an unknown suite or task."""
        return SuccessEvaluation(self, load_suite(self.suite, cache_dir), self.simulators(cache_dir))


@dataclass(frozen=True)
class Video:
    """The recording of one episode; `outcome` is "success" or "failure" (which includes the timeout)."""

    policy: str
    task: str
    outcome: str
    path: Path


class SuccessEvaluation:
    """Evaluates one policy after another; the simulators stay loaded in between."""

    def __init__(self, config: SuccessConfig, suite: Suite, make_simulator: MakeSimulator) -> None:
        self._config, self._suite, self._protocol = config, suite, config.played_by
        episodes = config.episodes or {task.name: self._protocol.trials for task in suite.tasks}
        self.tasks: tuple[Task, ...] = tuple(suite.task(name) for name in episodes)
        self.specs = [
            EpisodeSpec(suite.name, task.name, Split.HELD_OUT.seed(trial), trial)
            for task in self.tasks
            for trial in range(config.first_layout, config.first_layout + episodes[task.name])
        ]
        self._make_simulator = make_simulator
        self._pool: SimPool | None = None
        self._policy: PolicyService | None = None

    def run(
        self,
        name: str,
        source: PolicySource,
        journal: Path,
        *,
        sink: MetricSink | None = None,
        on_result: Callable[[EpisodeResult], None] = lambda result: None,
    ) -> SuccessTable:
        """Plays the episodes that `journal` lacks, and tabulates all of them.

        Args:
            name: the policy's, in tables.
            sink: gets `success/<family>` and `success/task/<task>` with their intervals, and the fingerprint.
            on_result: called for each new result (progress bars).

        Raises:
            JournalError: the journal is of another policy, suite, protocol or set of library versions.
            JobFailedError: an episode failed in every attempt.
        """
        depends_on = self.fingerprint(source)
        with Journal(journal, depends_on) as records:
            results = self._play_rounds(source, records, on_result)
        table = tabulate(name, self.tasks, results, depends_on)
        if self._config.stop_width is not None:
            table = replace(table, anytime95=confidence_sequence(_means_over_tasks(results))[-1])
        sink = sink or Sinks()
        sink.log_params({f"fingerprint.{key}": value for key, value in depends_on.items()})
        sink.log(_metrics(table), step=0)
        return table

    def record(self, table: SuccessTable, source: PolicySource, directory: Path) -> list[Video]:
        """Replays the first success and the first failure of each task with a camera; one mp4 each.

        A replay need not end as the episode did (batches of another size round differently): then the next
        episode of that outcome is tried, a few times. Videos that are in `directory` already are kept.
        """
        candidates: dict[tuple[str, str], list[EpisodeSpec]] = {}
        for result in table.results:
            candidates.setdefault((result.spec.task, _binary(result)), []).append(result.spec)
        files = {(task, outcome): directory / f"{task}-{outcome}.mp4" for task, outcome in candidates}
        for attempt in range(_REPLAYS):
            wanted = [
                (specs[attempt], files[key])
                for key, specs in candidates.items()
                if attempt < len(specs) and not files[key].exists()
            ]
            self._replay(wanted, source)
        return [
            Video(table.policy, task, outcome, path) for (task, outcome), path in files.items() if path.exists()
        ]

    def fingerprint(self, source: PolicySource) -> dict[str, str]:
        """Everything that a result depends on but its episode's key."""
        return {
            "protocol": str(self._protocol),
            "suite": self._suite.name,
            "suite_version": self._suite.version,
            "camera_size": str(self._protocol.render_size or self._config.camera_size),
            "profile": self._config.profile,
            "first_layout": str(self._config.first_layout),
            "policy_sha256": source.sha256(),
            **fingerprint(),
        }

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._policy is not None:
            self._policy.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _play_rounds(
        self, source: PolicySource, records: Journal, on_result: Callable[[EpisodeResult], None]
    ) -> list[EpisodeResult]:
        """The records of all episodes, or of as many rounds of them as it took to know enough."""
        results: list[EpisodeResult] = []
        for specs in self._rounds():
            policy = self._serve(source)
            results += evaluate_episodes(
                specs,
                self._simulators(),
                policy,
                records,
                max_attempts=self._config.max_attempts,
                on_result=self._adding_simulators(policy, on_result),
            )
            if self._config.stop_width is not None:
                low, high = confidence_sequence(_means_over_tasks(results))[-1]
                if high - low <= self._config.stop_width:
                    break
        return sorted(results, key=lambda result: (result.spec.task, result.spec.trial))

    def _rounds(self) -> list[list[EpisodeSpec]]:
        """All at once; or some trials of every task after the other, so that none is left out unfinished."""
        if self._config.stop_width is None:
            return [self.specs]
        by_trial: dict[int, list[EpisodeSpec]] = {}
        for spec in self.specs:
            by_trial.setdefault(spec.trial, []).append(spec)
        trials = list(by_trial.values())
        size = math.ceil(_EPISODES_PER_ROUND * len(self._simulators()) / len(self.tasks))
        return [list(chain(*trials[first : first + size])) for first in range(0, len(trials), size)]

    def _simulators(self) -> SimPool:
        if self._pool is None:
            count = self._config.num_simulators
            self._pool = SimPool(
                self._make_simulator,
                count or cluster_cores(),
                execute=self._protocol.execute,
                cpus_per_simulator=None if count else 1 / MOST_PER_CORE,  # leaves room for those that are added
            )
        return self._pool

    def _adding_simulators(
        self, policy: PolicyService, on_result: Callable[[EpisodeResult], None]
    ) -> Callable[[EpisodeResult], None]:
        """Where their number is left open: `on_result`, and once a few episodes are played, as many as pay."""
        if self._config.num_simulators:
            return on_result
        pool, played = self._simulators(), list[EpisodeResult]()

        def watch(result: EpisodeResult) -> None:
            played.append(result)
            if len(played) == _EPISODES_PER_ROUND * cluster_cores():
                pool.add(max(simulators_for(cluster_cores(), played, policy.stats()["busy"]) - len(pool), 0))
            on_result(result)

        return watch

    def _serve(self, source: PolicySource) -> PolicyService:
        if self._policy is None:
            self._policy = PolicyService(
                source,
                threads=self._config.policy_threads,
                resources=self._config.policy_resources,
                replicas=self._config.policy_replicas,
                capacity=self._config.policy_capacity,
            )
        self._policy.switch(source)
        return self._policy

    def _replay(self, wanted: Sequence[tuple[EpisodeSpec, Path]], source: PolicySource) -> None:
        unchecked = {spec.key: path.with_suffix(".replay.mp4") for spec, path in wanted}
        final = {spec.key: path for spec, path in wanted}
        specs = [spec for spec, _ in wanted]
        for result in self._simulators().run(specs, self._serve(source), videos=unchecked):
            recorded, path = unchecked[result.spec.key], final[result.spec.key]
            if path.stem.endswith(f"-{_binary(result)}"):
                recorded.replace(path)
            else:
                recorded.unlink()


def _means_over_tasks(results: Sequence[EpisodeResult]) -> list[float]:
    """Of every trial, in their order: its success over the tasks."""
    trials: dict[int, list[bool]] = {}
    for result in results:
        trials.setdefault(result.spec.trial, []).append(result.success)
    return [fmean(trials[trial]) for trial in sorted(trials)]


def _binary(result: EpisodeResult) -> str:
    return "success" if result.success else "failure"


def _metrics(table: SuccessTable) -> Mapping[str, float]:
    metrics: dict[str, float] = {}
    for prefix, rows in (("success", table.families), ("success/task", table.tasks)):
        for row in rows:
            name, (low, high) = f"{prefix}/{row.name}", row.wilson95
            metrics |= {name: row.rate, f"{name}/low": low, f"{name}/high": high}
    if table.anytime95 is not None:
        metrics |= dict(zip(("success/anytime/low", "success/anytime/high"), table.anytime95, strict=True))
    steps = [result.steps for result in table.results if result.success]
    return metrics | ({"success/steps": sum(steps) / len(steps)} if steps else {})
