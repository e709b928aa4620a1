"""Processes are killed or run long, of simulators that start in a second; in full: `python -m tests.endurance`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipvla.rollout.episode import run_episode
from ipvla.rollout.evaluation import SimPool
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.types import EpisodeSpec
from tests.endurance.__main__ import EnduranceStudy
from tests.endurance.chaos import measure_chaos, same_episode
from tests.endurance.recall_service import left_behind
from tests.endurance.soak import measure_soak, slope
from tests.rollout.point import Points, PointSimulator, load_point


class PointService:
    """Stands for `RecallService`: processes that start in a second."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def running(self) -> Iterator[tuple[SimPool, PolicyService]]:
        policy = PolicyService(PolicySource(load_point, self._directory))
        with SimPool(SlowPoints(), 2, cpus_per_simulator=0) as pool:
            yield pool, policy
        policy.close()

    def specs(self, tasks: int, episodes: int) -> list[EpisodeSpec]:
        return [EpisodeSpec("point", f"ground_{i % tasks}", i, i) for i in range(episodes)]


class SlowPoints(Points):
    def __call__(self, suite: str, task: str) -> Any:
        simulator = super().__call__(suite, task)
        step = simulator.step

        def slow(action: Any) -> Any:
            time.sleep(0.02)
            return step(action)

        simulator.step = slow  # type: ignore[method-assign]
        return simulator


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_chaos_kills_and_compares(tmp_path: Path) -> None:
    service: Any = PointService(tmp_path)
    chaos = measure_chaos(service, 60, (1.0, 2.0), tmp_path, most_kills=3)
    assert sum(chaos.kills.values()) >= 1
    assert (chaos.episodes, chaos.lost, chaos.doubled, chaos.different) == (60, 0, 0, 0)
    assert chaos.disturbed_s > chaos.undisturbed_s > 0


def test_an_episode_that_went_another_way_is_another_episode(tmp_path: Path) -> None:
    spec, act = EpisodeSpec("point", "ground_go", 3, 0), np.ones((2, 1), np.float32)
    one = run_episode(PointSimulator("ground_go"), spec, lambda *_: act)
    assert same_episode(one, replace(one, wall_s=9.0, spec=replace(spec, attempt=2)))
    other = run_episode(PointSimulator("ground_go"), spec, lambda *_: 0.999999 * act)
    assert one.outcome == other.outcome
    assert not same_episode(one, other)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_soak_reads_every_process_that_lasts(tmp_path: Path) -> None:
    service: Any = PointService(tmp_path)
    told: list[int] = []
    soak = measure_soak(service, 60, 10, tmp_path / "soak.sqlite", told.append, warm_up=1)
    assert told == [10, 20, 30, 40, 50, 60]
    assert soak.episodes == 60
    assert {"driver", "simulator", "policy", "raylet", "gcs"} <= {process.kind for process in soak.processes}
    assert (soak.leases, soak.replaced, soak.actors) == (0, 0, 0)
    assert all(len(process.course_mb) == 6 and min(process.course_mb) > 1 for process in soak.processes)
    with service.running() as (pool, policy):
        list(pool.run(service.specs(1, 2), policy))
        assert left_behind(patience_s=0) == 3, "two simulators and a replica, while nobody has closed them"
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2)


def test_too_short_a_soak_is_refused() -> None:
    with pytest.raises(ValueError, match="ask for 400 or more"):
        EnduranceStudy(soak_episodes=100)
