"""Episodes against a policy, over a pool of simulators, into a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ipvla.rollout.chunk_player import Pace
from ipvla.rollout.endpoint import Service
from ipvla.rollout.journal import Journal
from ipvla.rollout.sim_pool import WorkerPool
from ipvla.rollout.sim_worker import EpisodeJob, MakeSimulator, SimWorker, VideoJob, episode_id
from ipvla.types import EpisodeResult, EpisodeSpec


class SimPool(WorkerPool):
    """N simulator actors; their simulators stay loaded from one policy to the next.

    Args:
        execute: actions of every chunk that are played; None for all.
        pace: how late answers come, and how one takes over from another; None for a world that waits.
        episode_timeout_s: an episode that takes longer is given up, its simulator replaced, and it runs again.
        cpus_per_simulator, environment, python: see `WorkerPool`, also for errors.
    """

    def __init__(
        self,
        make_simulator: MakeSimulator,
        num_simulators: int,
        *,
        execute: int | None = None,
        pace: Pace | None = None,
        cpus_per_simulator: float | None = None,
        environment: Mapping[str, str] | None = None,
        python: str = "",
        episode_timeout_s: float = 900.0,
    ) -> None:
        super().__init__(
            partial(SimWorker, make_simulator, execute, pace),
            num_simulators,
            cpus_per_worker=cpus_per_simulator,
            environment=environment,
            python=python,
            job_timeout_s=episode_timeout_s,
        )

    def run(
        self,
        specs: Sequence[EpisodeSpec],
        policy: Service,
        *,
        max_attempts: int = 3,
    ) -> Iterator[EpisodeResult]:
        """Yields results as episodes end. An episode whose simulator or policy died runs again from its seed.

        Raises:
            JobFailedError: an episode failed `max_attempts` times.
        """

        def prepare(spec: EpisodeSpec, attempt: int) -> EpisodeJob:
            client = policy.client()
            if attempt:
                client.end(episode_id(replace(spec, attempt=attempt - 1)))
            return EpisodeJob(replace(spec, attempt=attempt), client, policy.view)

        jobs = self.map(
            specs,
            group=lambda spec: f"{spec.suite}/{spec.task}",
            name=lambda spec: spec.key,
            prepare=prepare,
            max_attempts=max_attempts,
        )
        for _, result in jobs:
            yield result

    def record(self, jobs: Sequence[VideoJob]) -> list[Path]:
        """Writes videos of recorded episodes; an episode whose actions lead elsewhere now has none.

        Raises:
            JobFailedError: a simulator failed again and again.
        """
        recorded = self.map(
            jobs,
            group=lambda job: f"{job.recorded.spec.suite}/{job.recorded.spec.task}",
            name=lambda job: str(job.path),
        )
        return sorted(path for _, path in recorded if path is not None)


def evaluate_episodes(
    specs: Sequence[EpisodeSpec],
    pool: SimPool,
    policy: Service,
    journal: Journal,
    *,
    max_attempts: int = 3,
    on_result: Callable[[EpisodeResult], None] = lambda result: None,
) -> list[EpisodeResult]:
    """Runs those of `specs` that the journal lacks and returns the records of all of them, by task and trial.

    Args:
        on_result: called for every new record, after it is written.

    Raises:
        JobFailedError: an episode failed `max_attempts` times; what was recorded stays.
    """
    for result in pool.run(journal.missing(specs), policy, max_attempts=max_attempts):
        if journal.record(result):
            on_result(result)
    return journal.results(specs)
