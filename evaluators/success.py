"""Closed-loop success on held-out layouts, over a pool of simulators."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Self

from evaluators.episodes import Video, VideoChoice, chosen_videos
from evaluators.intervals import confidence_sequence, wilson_interval
from evaluators.rollout_status import RolloutStatus
from evaluators.success_table import SuccessTable, tabulate
from evaluators.timeline import has_timeline, timeline
from ipvla.contract import Contract, readable_changes
from ipvla.models.speeds import SlowPace
from ipvla.rollout.chunk_player import Pace
from ipvla.rollout.chunking import ChunkingConfig, SwitchConfig
from ipvla.rollout.endpoint import PolicyEndpoint, Service, Serving
from ipvla.rollout.evaluation import SimPool, evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.rollout.latency import Latency, require_hold
from ipvla.rollout.sim_pool import MOST_PER_CORE, cluster_cores, cluster_room, simulators_for
from ipvla.rollout.sim_worker import MakeSimulator, SuiteSimulators, VideoJob
from ipvla.sim.altered_tasks import task_and_kind
from ipvla.sim.environment import require_simulators
from ipvla.sim.fingerprint import fingerprint
from ipvla.sim.instructions.sets import instruction_set
from ipvla.sim.perturbations import PerturbationConfig
from ipvla.sim.protocols import EvaluationProtocol, ProtocolError, load_protocol
from ipvla.sim.simulator import Split, Task
from ipvla.sim.suite import PROFILES, Suite, SuiteEntry, SuiteFacts
from ipvla.sim.suites import SETTINGS, known_entry, suite_entry
from ipvla.tracking import MetricSink, Sinks
from ipvla.types import EpisodeResult, EpisodeSpec

#: For each simulator, where an evaluation may stop after every round.
_EPISODES_PER_ROUND = 4
_STATS_EVERY_S = 2.0
#: Of a result's fingerprint: in which terms its policy played otherwise than the protocol's own clients.
_CONTRACT = "contract"


@dataclass(frozen=True)
class SuccessConfig:
    """An evaluation's settings; `build` opens it.

    Attributes:
        suite: by name, or `gym:PATH.yaml` for Gymnasium environments, see `ipvla.sim.gym.settings`.
        protocol: by name, see `ipvla.sim.protocols`; by default the suite's own.
        profile: how pictures are drawn, "exact" or "fast" (`ipvla.sim.suites.PROFILES`).
        perturbation: of every episode, one of LIBERO-Plus' dimensions (`ipvla.sim.perturbations`); None for none.
        episodes: task -> number; trial i plays held-out layout i, the same for every policy. Empty for as many of
            every task of the suite as the protocol has trials.
        first_layout: the first trial of every task; another slice of layouts than those of earlier studies.
        stop_width: ends as soon as the mean over tasks is known to within an interval of this width that holds
            after every round (`evaluators.intervals.confidence_sequence`); None to play every episode.
        num_simulators: simulator actors; None for one per core of the cluster at first, and more of them if these
            wait for the policy; no more than its memory has room for.
        camera_size: side of rendered pictures in pixels, where the protocol leaves it open.
        max_attempts: runs of one episode before the evaluation gives up.
        episode_timeout_s: a run that takes longer counts as hung: its simulator is replaced and it runs again.
        policy_threads: CPU threads of the policy's forward pass.
        policy_resources: what a policy actor asks Ray for, such as {"num_gpus": 1}.
        policy_replicas: actors with the same policy; one of them serves an episode to its end.
        policy_capacity: episodes that one of them has in memory at a time; None for no limit.
        policy_lease_s: an episode without a request for so many seconds is forgotten and frees its place; choose
            more than a simulator takes between two requests.
        policy_max_batch: observations of a forward pass, None for as many as wait; with 1, results are the same to
            the last bit with any number of simulators, and also if processes die.
        latency_steps: control steps from an observation to the first action of the answer; or measured ones, of
            which every call draws one. 0 for a world that waits.
        meanwhile: what is played until then: `hold` keeps the robot still, `rest` plays the last chunk's rest.
        chunking: how an answer takes over from the last one, see `ipvla.rollout.chunking`.
        slow: how often the slow part of a policy at two speeds thinks, and how long that takes.
    """

    suite: str = "recall"
    protocol: str = ""
    profile: str = "exact"
    perturbation: PerturbationConfig | None = None
    episodes: dict[str, int] = field(default_factory=dict)
    first_layout: int = 0
    stop_width: float | None = None
    num_simulators: int | None = None
    camera_size: int = 64
    max_attempts: int = 3
    episode_timeout_s: float = 900.0
    policy_threads: int = 1
    policy_resources: dict[str, float] = field(default_factory=dict)
    policy_replicas: int = 1
    policy_capacity: int | None = None
    policy_lease_s: float = 900.0
    policy_max_batch: int | None = None
    latency_steps: int | tuple[int, ...] = 0
    meanwhile: str = "hold"
    chunking: ChunkingConfig = field(default_factory=SwitchConfig)
    slow: SlowPace = field(default_factory=SlowPace)

    def __post_init__(self) -> None:
        _ = self.pace
        for name in (
            "camera_size",
            "max_attempts",
            "episode_timeout_s",
            "policy_threads",
            "policy_replicas",
            "policy_lease_s",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; pass {name} >= 1")
        for name in ("num_simulators", "policy_capacity", "policy_max_batch"):
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
        profiles = PROFILES if self._facts is None else self._facts.profiles
        if self.profile not in profiles:
            raise ValueError(f"profile is {self.profile!r}; for {self.suite} choose among {', '.join(profiles)}")
        if self._facts is not None:
            self.played_by.horizon(self.suite, 1)  # one that does not cover the suite is told now
            self._require_perturbation(self._facts)
            self._require_cameras(self._facts)

    @property
    def pace(self) -> Pace:
        """How late answers come, and how one takes over from another."""
        return Pace(Latency.of(self.latency_steps, self.meanwhile), self.chunking)

    @property
    def played_by(self) -> EvaluationProtocol:
        default = SuiteFacts() if self._facts is None else self._facts
        return load_protocol(self.protocol or default.default_protocol)

    @property
    def _facts(self) -> SuiteFacts | None:
        """The suite's, None for one that does not exist: `build` says so."""
        entry = known_entry(self.suite)
        return None if entry is None else entry.facts

    def _require_perturbation(self, facts: SuiteFacts) -> None:
        wanted = self.perturbation
        if wanted is None or wanted.dimension in facts.perturbations:
            return
        known = f"choose one of {', '.join(facts.perturbations)}" if facts.perturbations else "it can play none"
        raise ValueError(f"perturbation.type: suite {self.suite} cannot play {wanted.dimension!r}; {known}")

    def _require_cameras(self, facts: SuiteFacts) -> None:
        shown = self.played_by.cameras if facts.contract is None else facts.contract.cameras
        if lacking := [camera for camera in self.played_by.cameras if camera not in shown]:
            raise ProtocolError(
                f"protocol {self.played_by.name} shows {', '.join(lacking)}; {self.suite} has {', '.join(shown)}"
            )

    @property
    def suite_name(self) -> str:
        """What its results are filed under."""
        entry = known_entry(self.suite)
        return self.suite if entry is None else entry.name

    @property
    def entry(self) -> SuiteEntry | None:
        """The suite, where it has settings in place of a name."""
        entry = known_entry(self.suite)
        return entry if entry is not None and entry.facts.settings else None

    def simulators(self, cache_dir: Path) -> SuiteSimulators:
        """What opens the simulators of these episodes. AssetsError if their perturbation lacks its files."""
        if self.perturbation is not None:
            self.perturbation.build(self.suite)
        views = (self.camera_size, self.played_by, self.profile, self.perturbation)
        return SuiteSimulators(cache_dir, *views, self.entry)

    def build(self, cache_dir: Path) -> SuccessEvaluation:
        """Opens the suite; Ray is needed once episodes run.

        Raises:
            ValueError: the suite or a task is unknown.
            SimulatorError: this machine's environment cannot run simulators.
            GymError: an environment is not what its settings say.
        """
        require_simulators()
        suite = suite_entry(self.suite).load(cache_dir)
        suite.facts.inspect()
        return SuccessEvaluation(self, suite, self.simulators(cache_dir))


class SuccessEvaluation:
    """Evaluates one policy after another; the simulators stay loaded in between.

    Args:
        serve: the service of a source, started and closed by the caller; None to start services here.
    """

    def __init__(
        self,
        config: SuccessConfig,
        suite: Suite,
        make_simulator: MakeSimulator,
        serve: Callable[[PolicyEndpoint], Service] | None = None,
    ) -> None:
        self._config, self._suite, self._protocol = config, suite, config.played_by
        episodes = config.episodes or {task.name: self._protocol.trials for task in suite.tasks}
        self.tasks: tuple[Task, ...] = tuple(suite.task(name) for name in episodes)
        self.specs = [
            EpisodeSpec(suite.name, task.name, Split.HELD_OUT.seed(trial), trial)
            for task in self.tasks
            for trial in range(config.first_layout, config.first_layout + episodes[task.name])
        ]
        self._make_simulator, self._served_by = make_simulator, serve
        self._pool: SimPool | None = None
        self._policy: Service | None = None
        world = suite.facts.contract
        if config.pace.latency.longest:
            require_hold(world)
        self._serving = Serving(
            None if world is None else self._protocol.contract(world),
            f"suite {suite.name} by protocol {self._protocol.name}",
            config.policy_threads,
            config.policy_resources,
            config.policy_replicas,
            config.policy_capacity,
            config.policy_lease_s,
            config.policy_max_batch,
        )

    def run(
        self,
        name: str,
        source: PolicyEndpoint,
        journal: Path,
        *,
        conditions: Mapping[str, str] = MappingProxyType({}),
        sink: MetricSink | None = None,
        step: int = 0,
        on_status: Callable[[RolloutStatus], None] = lambda status: None,
    ) -> SuccessTable:
        """Plays the episodes that `journal` lacks, and tabulates all of them.

        Args:
            name: the policy's, in tables.
            conditions: what else the results depend on; they become part of the fingerprint.
            sink: gets `success/<suite>`, `success/<suite>/<task>` and `success/<suite>/family/<family>` with their
                intervals (`/low`, `/high`), `success/<suite>/<task>/subgoals` of tasks that have such, and the
                fingerprint.
            step: of these metrics: how long the policy has been trained, say.
            on_status: called at the start and after each new result (progress bars).

        Raises:
            JournalError: the journal is of another policy, suite, protocol or set of library versions.
            JobFailedError: an episode failed in every attempt.
        """
        depends_on = {**self.fingerprint(source), **conditions}
        with Journal(journal, depends_on) as records:
            results = self._play_rounds(source, records, on_status)
        table = tabulate(name, self.tasks, results, depends_on)
        if self._config.stop_width is not None:
            table = replace(table, anytime95=confidence_sequence(_means_over_tasks(results))[-1])
        sink = sink or Sinks()
        sink.log_params({f"fingerprint.{key}": value for key, value in depends_on.items()})
        sink.log(_metrics(table, f"success/{self._suite.name}"), step)
        return table

    @property
    def instructions(self) -> set[str]:
        """All that a policy may be given. AssetsError if the perturbation lacks its files."""
        wanted = self._config.perturbation
        perturbation = None if wanted is None else wanted.build(self._config.suite)
        given: set[str] = set()
        for spec in self.specs:
            phrasings = self._suite.task(spec.task).phrasings
            if perturbation is not None:
                change = perturbation.change(spec.task, spec.seed)
                phrasings = tuple(change.instruction(phrasing) for phrasing in phrasings)
            given.update(phrasings)
        return given

    def view(self, source: PolicyEndpoint) -> Contract | None:
        """On which terms it plays, None if the suite states none.

        Raises:
            ContractError: it does not fit the suite.
        """
        offered = self._serving.offered
        return None if offered is None else source.view(offered, self._serving.world)

    def conversions(self, source: PolicyEndpoint) -> str:
        """What is converted for it, in words; "" for nothing. ContractError as in `view`."""
        view, offered = self.view(source), self._serving.offered
        return "" if view is None or offered is None else readable_changes(view, offered)

    def record(self, table: SuccessTable, journal: Path, choice: VideoChoice, directory: Path) -> list[Video]:
        """Videos of these episodes of a policy, played again from what `journal` recorded; one mp4 each.

        Those that are in `directory` already are kept. There is none of an episode whose actions were not
        recorded, or that does not go the same way again (a journal of another kind of machine), or of a suite that
        cannot be replayed.
        """
        if not self._suite.facts.replayable:
            return []
        view = recorded_view(table.fingerprint, self._protocol, self._suite)
        videos = chosen_videos(table, choice, directory)
        with Journal(journal, table.fingerprint) as records:
            jobs = [
                VideoJob(result, trace.actions, video.path, view)
                for result, video in videos
                if not video.path.exists() and (trace := records.trace(result.spec))
            ]
            recorded = [(result, video, records.trace(result.spec)) for result, video in videos]
        self.simulators().record(jobs)
        return [
            replace(video, timeline=timeline(result, trace)) if trace and has_timeline(trace) else video
            for result, video, trace in recorded
            if video.path.exists()
        ]

    def fingerprint(self, source: PolicyEndpoint) -> dict[str, str]:
        """Everything that a result depends on but its episode's key, which says the layout."""
        return {
            "protocol": str(self._protocol),
            "suite": self._suite.name,
            "suite_version": self._suite.version,
            "camera_size": str(self._protocol.render_size or self._config.camera_size),
            "profile": self._config.profile,
            "policy_sha256": source.sha256(),
            **fingerprint(self._suite.facts.packages),
            **self._suite.facts.inspect(),
            **({SETTINGS: settings} if (settings := self._suite.facts.settings) else {}),
            **self._terms(source),
            **self._perturbed(),
            **self._config.pace.conditions(),
            **({"slow": str(self._config.slow)} if str(self._config.slow) else {}),
            **self._reworded(),
        }

    def _perturbed(self) -> dict[str, str]:
        """Nothing without a perturbation, so that earlier results remain what they are."""
        return {} if self._config.perturbation is None else {"perturbation": str(self._config.perturbation)}

    def _reworded(self) -> dict[str, str]:
        """Of tasks that are said by paraphrases (`ipvla.sim.altered_tasks`): which set these are of."""
        if not any(task_and_kind(task.name) for task in self.tasks):
            return {}
        return {"instructions": instruction_set(self._suite.name).fingerprint}

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
        self, source: PolicyEndpoint, records: Journal, on_status: Callable[[RolloutStatus], None]
    ) -> list[EpisodeResult]:
        """The records of all episodes, or of the rounds until the interval was narrow enough."""
        results: list[EpisodeResult] = []
        recorded = records.results(self.specs)
        status = RolloutStatus(len(self.specs), recorded)
        on_status(status)
        for specs in self._rounds():
            policy = self._serve(source)
            results += evaluate_episodes(
                specs,
                self.simulators(),
                policy,
                records,
                max_attempts=self._config.max_attempts,
                on_result=self._watch(policy, status, on_status),
            )
            if self._config.stop_width is not None:
                low, high = confidence_sequence(_means_over_tasks(results))[-1]
                if high - low <= self._config.stop_width:
                    break
        return sorted(results, key=lambda result: (result.spec.task, result.spec.trial))

    def _rounds(self) -> list[list[EpisodeSpec]]:
        """All episodes at once; or some trials of every task per round, so that every round is complete."""
        if self._config.stop_width is None:
            return [self.specs]
        by_trial: dict[int, list[EpisodeSpec]] = {}
        for spec in self.specs:
            by_trial.setdefault(spec.trial, []).append(spec)
        trials = list(by_trial.values())
        size = math.ceil(_EPISODES_PER_ROUND * len(self.simulators()) / len(self.tasks))
        return [list(chain(*trials[first : first + size])) for first in range(0, len(trials), size)]

    def simulators(self) -> SimPool:
        """The pool, opened at its first use."""
        if self._pool is None:
            count = self._config.num_simulators
            self._pool = SimPool(
                self._make_simulator,
                count or min(cluster_cores(), cluster_room(self._suite.facts.simulator_bytes)),
                execute=self._protocol.execute,
                pace=self._config.pace,
                cpus_per_simulator=None if count else 1 / MOST_PER_CORE,  # leaves room for those that are added
                environment=self._suite.facts.environment(),
                python=self._suite.facts.python,
                episode_timeout_s=self._config.episode_timeout_s,
            )
        return self._pool

    def _watch(
        self, policy: Service, status: RolloutStatus, on_status: Callable[[RolloutStatus], None]
    ) -> Callable[[EpisodeResult], None]:
        """Updates `status` and, where their number is left open, adds the simulators that keep the cores busy."""
        pool, cores = self.simulators(), cluster_cores()

        def on_result(result: EpisodeResult) -> None:
            status.add(result)
            if status.unheard_s > _STATS_EVERY_S:
                status.hear(policy.stats(), self._config.policy_replicas)
            if self._config.num_simulators is None and status.new == _EPISODES_PER_ROUND * cores:
                busy = policy.stats().get("busy", 0.0)
                enough = simulators_for(
                    cores, status.waiting, busy, cluster_room(self._suite.facts.simulator_bytes)
                )
                pool.add(max(enough - len(pool), 0))
            on_status(status)

        return on_result

    def _serve(self, source: PolicyEndpoint) -> Service:
        if self._served_by is not None:
            return self._served_by(source)
        self._policy = source.serve(self._serving, self._policy)
        return self._policy

    def _terms(self, source: PolicyEndpoint) -> dict[str, str]:
        """Nothing where it plays as the protocol's own clients, so that earlier results of those remain theirs."""
        view, offered = self.view(source), self._serving.offered
        if view is None or offered is None:
            return {}
        changes = replace(view, cameras=offered.cameras).changes(offered)  # fewer cameras change no picture
        return {_CONTRACT: json.dumps(changes, sort_keys=True)} if changes else {}


def recorded_view(fingerprint: Mapping[str, str], protocol: EvaluationProtocol, suite: Suite) -> Contract | None:
    """On which terms the actions of a journal with this fingerprint were given.

    One that says nothing is of a client that spoke the protocol's own language.
    """
    world = suite.facts.contract
    if world is None:
        return None
    return protocol.contract(world).pictures_alone.changed(json.loads(fingerprint.get(_CONTRACT, "{}")))


def _means_over_tasks(results: Sequence[EpisodeResult]) -> list[float]:
    """Of every trial, in their order: its success over the tasks."""
    trials: dict[int, list[bool]] = {}
    for result in results:
        trials.setdefault(result.spec.trial, []).append(result.success)
    return [fmean(trials[trial]) for trial in sorted(trials)]


def _metrics(table: SuccessTable, success: str) -> Mapping[str, float]:
    won, played = sum(result.success for result in table.results), len(table.results)
    low, high = wilson_interval(won, played)
    metrics = {success: won / played, f"{success}/low": low, f"{success}/high": high}
    for prefix, rows in ((success, table.tasks), (f"{success}/family", table.families)):
        for row in rows:
            name, (low, high) = f"{prefix}/{row.name}", row.wilson95
            metrics |= {name: row.rate, f"{name}/low": low, f"{name}/high": high}
    metrics |= {f"{success}/{task}/subgoals": share for task, share in table.subgoals.items()}
    if table.anytime95 is not None:
        metrics |= dict(zip((f"{success}/anytime/low", f"{success}/anytime/high"), table.anytime95, strict=True))
    steps = [result.steps for result in table.results if result.success]
    return metrics | ({f"{success}/steps": sum(steps) / len(steps)} if steps else {})
