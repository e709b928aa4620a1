"""Is the memory used? The success that the same held-out episodes lose when the memory is changed at step t.

Each intervention of `ipvla.rollout.memory_intervention` plays every episode that reaches control step t again.
Episodes that end before t keep their undisturbed result, so all rows are over the same n episodes.
The donor of `swap` is the nearest earlier trial of the same task that reached t, or the nearest later one if there
is none; its memory is recorded in the undisturbed pass. Settings and records call an intervention a probe.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from evaluators.intervals import mcnemar_exact, newcombe_paired_interval, wilson_interval
from evaluators.rollout_status import RolloutStatus
from evaluators.success import SuccessConfig, SuccessEvaluation
from evaluators.success_table import SuccessTable
from ipvla.choices import did_you_mean
from ipvla.files import write_text
from ipvla.rollout.endpoint import PolicyEndpoint, Serving
from ipvla.rollout.journal import Journal
from ipvla.rollout.memory_intervention import (
    INTERVENTIONS,
    InterventionService,
    InterventionSource,
    MemoryIntervention,
    RecordMemory,
    Shuffle,
    Swap,
    can_shuffle,
    has_part,
    memory_file,
)
from ipvla.rollout.policy_actor import PolicySource
from ipvla.rollout.policy_server import BatchPolicy
from ipvla.rollout.sim_worker import MakeSimulator
from ipvla.sim.environment import require_simulators
from ipvla.sim.suite import Suite
from ipvla.sim.suites import load_suite
from ipvla.tracking import MetricSink
from ipvla.types import EpisodeResult, EpisodeSpec

#: (what is being played, episodes done, episodes in all)
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class InterventionConfig:
    """The interventions and their times; `build` opens the suite.

    Attributes:
        kinds: of `reset`, `freeze`, `swap`, `shuffle`.
        times: control steps t, each below the horizon of every task that is played.
        part: of policies at two speeds, `slow` or `fast`: whose memory is changed; null for all of it.
    """

    kinds: tuple[str, ...] = tuple(INTERVENTIONS)
    times: tuple[int, ...] = (10, 20, 30, 40)
    part: str | None = None

    def __post_init__(self) -> None:
        for name in ("kinds", "times"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"probe.{name} is {list(values)}; name at least one, and none twice")
        for kind in self.kinds:
            if kind not in INTERVENTIONS:
                raise ValueError(f"probe.kinds: {kind!r} is no probe; {did_you_mean(kind, INTERVENTIONS)}")
        if self.part not in (None, "slow", "fast"):
            raise ValueError(f"probe.part is {self.part!r}; choose slow or fast, or null for all of the memory")
        if min(self.times) < 0:
            raise ValueError(f"probe.times: {min(self.times)} lies before the episode; pass control steps >= 0")

    @property
    def suffix(self) -> str:
        """Of the files of these results, so that those of other parts lie beside them."""
        return f"-{self.part}" if self.part else ""

    def require(self, name: str, policy: BatchPolicy) -> None:
        """ValueError if this policy remembers nothing in the part that is probed."""
        if self.part is not None and not has_part(policy, self.part):
            raise ValueError(
                f"probe.part is {self.part}, and {name} remembers nothing in such a part; leave it out, or train "
                "with model.speeds.type and model.speeds.memory"
            )

    def build(self, success: SuccessConfig, cache_dir: Path) -> MemoryUseEvaluation:
        """Opens the suite of `success`; Ray is needed once episodes run. ValueError as `MemoryUseEvaluation`'s."""
        require_simulators()
        suite = load_suite(success.suite, cache_dir)
        return MemoryUseEvaluation(self, success, suite, success.simulators(cache_dir))


@dataclass(frozen=True)
class LossRow:
    """One intervention at one t on the episodes of one task or family.

    Attributes:
        name: the task's or the family's.
        touched: episodes whose memory was changed; the others had ended before t (or had no donor).
        both, only_undisturbed, only_changed, neither: episodes by the runs that succeeded: with the memory as it
            is, with the memory changed.
    """

    name: str
    intervention: str
    t: int
    touched: int
    both: int
    only_undisturbed: int
    only_changed: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.only_undisturbed + self.only_changed + self.neither

    @property
    def undisturbed(self) -> int:
        """Successes with the memory as it is."""
        return self.both + self.only_undisturbed

    @property
    def k(self) -> int:
        """Successes with the memory changed."""
        return self.both + self.only_changed

    @property
    def wilson95(self) -> tuple[float, float]:
        return wilson_interval(self.k, self.n)

    @property
    def lost(self) -> float:
        """Undisturbed success rate minus the one with the memory changed."""
        return (self.only_undisturbed - self.only_changed) / self.n

    @property
    def lost95(self) -> tuple[float, float]:
        """Newcombe's paired interval of `lost`."""
        return newcombe_paired_interval(self.both, self.only_undisturbed, self.only_changed, self.neither)

    @property
    def p_value(self) -> float:
        """Exact McNemar test that the memory's change made no difference."""
        return mcnemar_exact(self.only_undisturbed, self.only_changed)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "probe": self.intervention,
            "t": self.t,
            "n": self.n,
            "touched": self.touched,
            "undisturbed": self.undisturbed,
            "k": self.k,
            "rate": self.k / self.n,
            "wilson95": list(self.wilson95),
            "lost": self.lost,
            "lost95": list(self.lost95),
            "only_undisturbed": self.only_undisturbed,
            "only_probed": self.only_changed,
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class MemoryUse:
    """The success that one policy loses.

    Attributes:
        policy: its name in reports.
        tasks, families: by t, then intervention, then in the suite's order.
        undisturbed: the same episodes with the memory as it is.
        left_out: intervention -> why it could not be made.
    """

    policy: str
    tasks: tuple[LossRow, ...]
    families: tuple[LossRow, ...]
    undisturbed: SuccessTable
    left_out: Mapping[str, str]

    def log(self, sink: MetricSink) -> None:
        """`memory_use/<task>/<intervention>`, the success lost, with its limits `/low` and `/high`, at step t."""
        for row in self.tasks:
            name, (low, high) = f"memory_use/{row.name}/{row.intervention}", row.lost95
            sink.log({name: row.lost, f"{name}/low": low, f"{name}/high": high}, step=row.t)

    def write(self, path: Path) -> Path:
        """Writes all of it as JSON; the file appears whole or not at all."""
        described = {
            "policy": self.policy,
            "fingerprint": dict(self.undisturbed.fingerprint),
            "undisturbed": {row.name: row.to_dict() for row in self.undisturbed.tasks},
            "left_out": dict(self.left_out),
            "tasks": [row.to_dict() for row in self.tasks],
            "families": [row.to_dict() for row in self.families],
        }
        return write_text(path, json.dumps(described, indent=1))


class MemoryUseEvaluation:
    """Measures one policy after another; the simulators stay loaded in between.

    Raises:
        ValueError: an unknown task, a t at or after some task's horizon, a swap with one episode of a task, or a
            world that does not wait.
    """

    def __init__(
        self, config: InterventionConfig, success: SuccessConfig, suite: Suite, make_simulator: MakeSimulator
    ) -> None:
        success.pace.require_plain("memory is probed")
        self._config, self._probe = success, config
        self._service: InterventionService | None = None
        self._success = SuccessEvaluation(success, suite, make_simulator, serve=self._serve)
        self._kinds, self._times = config.kinds, tuple(sorted(config.times))
        shortest = min(self._success.tasks, key=lambda task: task.horizon)
        if self._times[-1] >= shortest.horizon:
            raise ValueError(
                f"probe.times: no episode of {shortest.name} has a control step {self._times[-1]}, its horizon is "
                f"{shortest.horizon}; choose t < {shortest.horizon}, or leave the task out of success.episodes"
            )
        lone = [task for task, episodes in success.episodes.items() if episodes < 2]
        if Swap.kind in self._kinds and lone:
            raise ValueError(
                f"success.episodes.{lone[0]} is 1, which leaves swap no donor; play 2 or more, or drop swap from "
                "probe.kinds"
            )

    def measure(
        self,
        name: str,
        policy: BatchPolicy,
        source: PolicySource,
        directory: Path,
        *,
        on_progress: OnProgress = lambda what, done, total: None,
    ) -> MemoryUse:
        """Plays what the journals lack: `undisturbed.sqlite`, then one per intervention and t.

        Args:
            name: the policy's, in tables.
            policy: the policy of `source`, for its `execute` and the kinds of tensors in its memory.
            directory: of the journals and the donors' memories; the policy's actor must be able to write there.

        Raises:
            JournalError: a journal is of another policy, suite, protocol or set of library versions.
            JobFailedError: an episode failed in every attempt.
        """
        left_out: dict[str, str] = {}
        part = self._probe.part
        if Shuffle.kind in self._kinds and not can_shuffle(policy, part):
            left_out[Shuffle.kind] = "the memory has no floating-point tensor whose values could be permuted"
        cells = [(t, kind) for t in self._times for kind in self._kinds if kind not in left_out]
        bar = _Bar(on_progress, len(self._success.specs), 1 + len(cells))

        donors = directory / "donors" / self._digest(source)
        records = tuple(RecordMemory(t, donors) for t in self._times if Swap.kind in self._kinds)
        recording = InterventionSource(source.load, source.directory, records)
        bar.start(f"{name} undisturbed")
        undisturbed = self._success.run(name, recording, directory / "undisturbed.sqlite", on_status=bar.update)
        reached = {t: _reached(undisturbed.results, t, policy.execute) for t in self._times}
        self._record(recording, reached)

        before = {result.spec.key: result.success for result in undisturbed.results}
        own = {task.name: task.name for task in self._success.tasks}
        family = {task.name: task.family for task in self._success.tasks}
        tasks, families = list[LossRow](), list[LossRow]()
        for t, kind in cells:
            intervention = replace(INTERVENTIONS[kind](t), part=part)
            touched = frozenset(spec.key for spec in reached[t])
            if kind == Swap.kind:
                files = _donors(reached[t], t, donors)
                intervention, touched = Swap(t, files, part=part), frozenset(files)
            bar.start(f"{name} {kind} at {t}")
            table = self._play(name, intervention, touched, source, undisturbed, directory, bar)
            tasks += _rows(kind, t, touched, table, before, own)
            families += _rows(kind, t, touched, table, before, family)
        bar.start(f"{name} done")
        return MemoryUse(name, tuple(tasks), tuple(families), undisturbed, left_out)

    def fingerprint(self, source: PolicyEndpoint) -> dict[str, str]:
        """Everything that a result depends on but its episode's key: the intervention is part of it."""
        return {**self._success.fingerprint(source), **_conditions(source)}

    def close(self) -> None:
        self._success.close()
        if self._service is not None:
            self._service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, source: PolicyEndpoint) -> InterventionService:
        if not isinstance(source, InterventionSource):
            raise TypeError(f"{source} has no memory to change; measure a policy")
        if self._service is None or self._service.source != source:
            if self._service is not None:
                self._service.close()
            serving = Serving(threads=self._config.policy_threads, resources=self._config.policy_resources)
            self._service = InterventionService(source, serving)
        self._service.view = self._success.view(source)
        self._service.interventions = source.interventions
        return self._service

    def _digest(self, source: PolicySource) -> str:
        """Names the policy and all that its memory depends on: donors of another one must not be taken."""
        described = json.dumps(self.fingerprint(source), sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    def _record(self, source: InterventionSource, reached: Mapping[int, Sequence[EpisodeSpec]]) -> None:
        """Plays episodes again whose memory at some t has not been recorded."""
        unrecorded = {
            spec.key: spec
            for record in source.interventions
            if isinstance(record, RecordMemory)
            for spec in reached[record.t]
            if not memory_file(record.directory, spec.key, record.t).exists()
        }
        specs, pool = list(unrecorded.values()), self._success.simulators()
        for _ in pool.run(specs, self._serve(source), max_attempts=self._config.max_attempts):
            pass

    def _play(
        self,
        name: str,
        intervention: MemoryIntervention,
        touched: frozenset[str],
        source: PolicySource,
        undisturbed: SuccessTable,
        directory: Path,
        bar: _Bar,
    ) -> SuccessTable:
        changed = InterventionSource(source.load, source.directory, (intervention,))
        journal = directory / f"{intervention.kind}-{intervention.t}{self._probe.suffix}.sqlite"
        with Journal(journal, self.fingerprint(changed)) as records:
            for result in undisturbed.results:
                if result.spec.key not in touched:
                    records.record(result)
        return self._success.run(name, changed, journal, conditions=_conditions(changed), on_status=bar.update)


class _Bar:
    """Counts stages of equally many episodes; episodes that a journal already holds are skipped."""

    def __init__(self, on_progress: OnProgress, episodes: int, stages: int) -> None:
        self._on_progress, self._episodes, self._total = on_progress, episodes, episodes * stages
        self._what, self._stage, self._played = "", -1, 0

    def start(self, what: str) -> None:
        self._what, self._stage, self._played = what, self._stage + 1, 0
        self._report()

    def update(self, status: RolloutStatus) -> None:
        self._played = status.played
        self._report()

    def _report(self) -> None:
        self._on_progress(self._what, self._stage * self._episodes + self._played, self._total)


def _conditions(source: PolicyEndpoint) -> dict[str, str]:
    """The interventions of a source as the fingerprint has them; a record changes nothing."""
    interventions = source.interventions if isinstance(source, InterventionSource) else ()
    probes = [one for one in interventions if one.kind in INTERVENTIONS]
    parts = [one.part for one in probes if one.part]
    return {**{f"probe.{one.kind}": str(one.t) for one in probes}, **({"probe.part": parts[0]} if parts else {})}


def _reached(results: Sequence[EpisodeResult], t: int, execute: int) -> list[EpisodeSpec]:
    """Episodes with a policy step at or after control step t."""
    return [result.spec for result in results if result.policy_steps > -(-t // execute)]


def _donors(reached: Sequence[EpisodeSpec], t: int, directory: Path) -> dict[str, Path]:
    """Episode -> its donor's memory at t. More episodes, played later, do not change anyone's donor."""
    recorded = [spec for spec in reached if memory_file(directory, spec.key, t).exists()]
    chosen = {}
    for spec in reached:
        others = [other for other in recorded if other.task == spec.task and other.trial != spec.trial]
        if others:
            donor = min(others, key=lambda other, own=spec.trial: (other.trial > own, abs(other.trial - own)))  # type: ignore[misc]
            chosen[spec.key] = memory_file(directory, donor.key, t)
    return chosen


def _rows(
    kind: str,
    t: int,
    touched: Collection[str],
    changed: SuccessTable,
    before: Mapping[str, bool],
    group: Mapping[str, str],
) -> Iterator[LossRow]:
    """One row per group of tasks, in their order."""
    for name in dict.fromkeys(group.values()):
        results = [result for result in changed.results if group[result.spec.task] == name]
        pairs = Counter((before[result.spec.key], result.success) for result in results)
        yield LossRow(
            name,
            kind,
            t,
            touched=sum(result.spec.key in touched for result in results),
            both=pairs[True, True],
            only_undisturbed=pairs[True, False],
            only_changed=pairs[False, True],
            neither=pairs[False, False],
        )
