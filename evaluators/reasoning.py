"""Reasoning once against reasoning at every step: one policy, the same episodes, both ways in turn in one process.

The act alone is measured, batch 1 on one thread: no actor and no other episode is in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evaluators.intervals import mcnemar_exact
from evaluators.paired import compare
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable, tabulate
from ipvla.policy import Policy
from ipvla.rollout.episode import run_episode
from ipvla.rollout.journal import Journal
from ipvla.rollout.policy_actor import PolicySource
from ipvla.rollout.sim_pool import WorkerPool, cluster_cores
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.simulator import Simulator, Task
from ipvla.types import EpisodeResult, EpisodeSpec, Observation

#: The two ways to reason, by the names of their records.
ONCE, EVERY = "once", "every step"


class MeteredAct:
    """One episode's `ipvla.rollout.episode.Act` at batch 1; counts what it costs.

    Attributes:
        wall_s, cpu_s: in the policy, of this process.
        tokens: of plans, written so far.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._memory = policy.initial_memory(1)
        self.wall_s = self.cpu_s = 0.0

    @torch.inference_mode()
    def __call__(self, observation: Observation, policy_step: int) -> npt.NDArray[np.float32]:
        wall, cpu = time.perf_counter(), time.process_time()
        chunks, self._memory = self._policy.act([observation], self._memory)
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu
        return chunks[0, : self._policy.execute]

    @property
    def tokens(self) -> int:
        return int(self._memory["written"].sum())


@dataclass(frozen=True)
class PlanJob:
    """An episode to be played by each of the policies in turn: name -> directory."""

    spec: EpisodeSpec
    policies: Mapping[str, Path]


class PlanWorker:
    """A worker of `ipvla.rollout.sim_pool.WorkerPool` for `PlanJob`s; what it has opened stays open."""

    def __init__(self, make_simulator: SuiteSimulators) -> None:
        torch.set_num_threads(1)
        self._make_simulator = make_simulator
        self._simulators: dict[str, Simulator] = {}
        self._policies: dict[Path, Policy] = {}

    def run(self, job: PlanJob) -> dict[str, EpisodeResult]:
        """Policy name -> the episode's result, with the act's `wall_s`, `cpu_s` and `tokens` in its details."""
        task = job.spec.task
        if task not in self._simulators:
            self._simulators[task] = self._make_simulator(job.spec.suite, task)
        simulator, results = self._simulators[task], {}
        for name, directory in job.policies.items():
            if directory not in self._policies:
                self._policies[directory] = Policy.load(directory)
                simulator.reset(job.spec.seed)
                MeteredAct(self._policies[directory])(simulator.observe(), 0)  # a process's first act is slow
            act = MeteredAct(self._policies[directory])
            result = run_episode(simulator, job.spec, act)
            costs = {"wall_s": act.wall_s, "cpu_s": act.cpu_s, "tokens": act.tokens}
            results[name] = replace(result, details={**result.details, **costs})
        return results


def play_both(
    config: SuccessConfig,
    cache_dir: Path,
    policies: Mapping[str, Path],
    on_result: Callable[..., None] = lambda completed, total: None,
) -> dict[str, list[EpisodeResult]]:
    """Plays what the journals beside the policies lack; policy name -> all its results.

    Args:
        on_result: gets by keyword how many layouts were played both ways, `completed`, of how many, `total`.

    Raises:
        JournalError: results of another policy or protocol lie there.
        JobFailedError: an episode failed in every attempt.
        ValueError: the world is not to wait.
    """
    config.pace.require_plain("plans are compared")
    with ExitStack() as stack:
        evaluation = stack.enter_context(config.build(cache_dir))
        journals = {}
        for name, directory in policies.items():
            place = directory.parent / f"{directory.name}-plan.sqlite"
            made_by = evaluation.fingerprint(PolicySource(Policy.load, directory))
            journals[name] = stack.enter_context(Journal(place, made_by))
        missing = {spec.key: spec for journal in journals.values() for spec in journal.missing(evaluation.specs)}
        jobs = [PlanJob(spec, policies) for spec in missing.values()]
        if jobs:
            make = partial(PlanWorker, SuiteSimulators(cache_dir, config.camera_size))
            pool = stack.enter_context(WorkerPool(make, min(config.num_simulators or cluster_cores(), len(jobs))))
            played = pool.map(jobs, group=lambda job: job.spec.task, name=lambda job: job.spec.key)
            for number, (_, results) in enumerate(played, 1):
                for name, result in results.items():
                    journals[name].record(result)
                on_result(completed=number, total=len(jobs))
        wanted = {spec.key for spec in evaluation.specs}
        return {
            name: [result for result in journal.results() if result.spec.key in wanted]
            for name, journal in journals.items()
        }


def plan_figures(tasks: Sequence[Task], results: Mapping[str, Sequence[EpisodeResult]]) -> dict[str, Any]:
    """What both ways cost per control step and reach, by how much once is cheaper, and the paired test.

    Args:
        results: of `ONCE` and `EVERY`, on the same episodes.
    """
    tables = {name: tabulate(name, tasks, played, {}) for name, played in results.items()}
    ways = {name: _way(table) for name, table in tables.items()}
    comparisons = compare(tables[ONCE], tables[EVERY], tasks)
    only_once, only_every, pairs = (
        sum(getattr(comparison, of) for comparison in comparisons) for of in ("only_first", "only_second", "pairs")
    )
    p_value = mcnemar_exact(only_once, only_every)
    return {
        "ways": ways,
        "wall_speedup": ways[EVERY]["wall_ms_per_step"] / ways[ONCE]["wall_ms_per_step"],
        "cpu_speedup": ways[EVERY]["cpu_ms_per_step"] / ways[ONCE]["cpu_ms_per_step"],
        "paired": {
            "pairs": pairs,
            "only_once": only_once,
            "only_every_step": only_every,
            "p_value": p_value,
            "families": [asdict(comparison) | {"p_value": comparison.p_value} for comparison in comparisons],
        },
        "once_loses_significantly": bool(p_value < 0.05 and only_every > only_once),
    }


def _way(table: SuccessTable) -> dict[str, Any]:
    steps = sum(result.steps for result in table.results)
    tokens, wall_s, cpu_s = (
        float(sum(result.details[name] for result in table.results)) / steps
        for name in ("tokens", "wall_s", "cpu_s")
    )
    per_step = {"tokens_per_step": tokens, "wall_ms_per_step": 1e3 * wall_s, "cpu_ms_per_step": 1e3 * cpu_s}
    return {"control_steps": steps, **per_step, "success": table.to_dict()}
