"""The pool with work that is no episode: what collection relies on."""

import itertools
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from ipvla.rollout.sim_pool import JobFailedError, WorkerPool, simulator_environment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@dataclass
class Squares:
    """Squares numbers; hangs the first time that it meets `hangs_at`."""

    marker: Path
    hangs_at: int = -1

    def run(self, job: int) -> tuple[int, int, dict[str, str | None]]:
        if job == self.hangs_at and not self.marker.exists():
            self.marker.touch()
            time.sleep(3600)
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MUJOCO_GL")
        return job**2, os.getpid(), {name: os.environ.get(name) for name in names}


def test_a_hanging_worker_is_replaced_and_its_job_runs_again(tmp_path):
    make_worker = partial(Squares, tmp_path / "hung", hangs_at=3)
    with WorkerPool(make_worker, 2, cpus_per_worker=0.5, job_timeout_s=4) as pool:
        done = list(pool.map(range(8)))
        assert sorted((job, result[0]) for job, result in done) == [(n, n**2) for n in range(8)]
        assert len({result[1] for _, result in done}) >= 2
        environment = done[0][1][2]
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["MUJOCO_GL"]

        processes = {result[1] for _, result in pool.map(range(20))}
        assert processes & {result[1] for _, result in done}, (
            "the pool keeps its processes from one run to the next"
        )


def test_simulators_that_draw_by_egl_are_told_which_gpu_as_cuda_is_hidden_from_them(monkeypatch):
    for name in ("MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM"):  # MuJoCo sets the second where it has drawn
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert simulator_environment()["MUJOCO_EGL_DEVICE_ID"] == "0"
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "1")
    assert simulator_environment()["MUJOCO_EGL_DEVICE_ID"] == "1"
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert "MUJOCO_EGL_DEVICE_ID" not in simulator_environment()


def test_a_worker_keeps_to_its_group_while_it_lasts(tmp_path):
    with WorkerPool(partial(Squares, tmp_path / "x"), 2, cpus_per_worker=0.5) as pool:
        done = list(pool.map(range(20), group=lambda n: "even" if n % 2 == 0 else "odd"))
    assert sorted(job for job, _ in done) == list(range(20))
    switches = 0
    for process in {result[1] for _, result in done}:
        parities = [job % 2 for job, result in done if result[1] == process]
        switches += sum(a != b for a, b in itertools.pairwise(parities))
    assert switches <= 2


def test_work_goes_on_where_there_is_a_cpu_for_it_and_ends_where_there_is_none(tmp_path):
    make_worker = partial(Squares, tmp_path / "x")
    with WorkerPool(make_worker, 2, cpus_per_worker=1.5) as pool:
        assert sorted(job for job, _ in pool.map(range(6))) == list(range(6)), "one of two never starts"
    with (
        WorkerPool(make_worker, 1, cpus_per_worker=3, start_timeout_s=2) as pool,
        pytest.raises(
            JobFailedError, match="no simulator process has started for 2 s: the cluster has no free CPU"
        ),
    ):
        list(pool.map(range(2)))


def test_those_that_were_started_beforehand_all_work_from_the_first_job_on(tmp_path):
    with WorkerPool(partial(Squares, tmp_path / "x"), 2, cpus_per_worker=0.5) as pool:
        pool.start()
        assert len({result[1] for _, result in pool.map(range(2))}) == 2


class SlowToStart:
    def __init__(self) -> None:
        time.sleep(5)

    def run(self, job: int) -> int:
        return job


def test_a_process_may_take_longer_to_start_than_a_job_has():
    with WorkerPool(SlowToStart, 1, cpus_per_worker=0.5, job_timeout_s=3) as pool:
        assert [result for _, result in pool.map(range(3))] == [0, 1, 2]
    with pytest.raises(ValueError, match="no process can start within 0 s"):
        WorkerPool(SlowToStart, 1, start_timeout_s=0)


class Stillborn:
    def __init__(self) -> None:
        raise OSError("no such scene")

    def run(self, job: int) -> int:
        return job


def test_workers_that_do_not_start_end_the_run():
    told = r"simulator processes in a row did not start; last: .*no such scene"
    with WorkerPool(Stillborn, 2, cpus_per_worker=0.5) as pool:
        with pytest.raises(JobFailedError, match=f"3 {told}"):
            list(pool.map(range(8)))
        with pytest.raises(JobFailedError, match=f"1 {told}"):
            pool.start(max_attempts=1)
