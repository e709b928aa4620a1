"""Ray actors that run jobs (episodes, demonstrations); dead actors are replaced and their jobs run again."""

from __future__ import annotations

import logging
import math
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import ray

from ipvla.sim.environment import gl_environment

Job = TypeVar("Job")
#: Simulators per core, at most: each takes some hundred MB.
MOST_PER_CORE = 2
#: Simulators wait for a policy that is busy for a larger share of the time; more of them would only queue.
_SATURATED = 0.9
_POLL_S = 1.0
_LONGEST_REASON = 500
_logger = logging.getLogger(__name__)


class Worker(Protocol):
    """A plain object in each actor. `run` gets what `prepare` returned for the job."""

    def run(self, job: Any) -> Any: ...


class JobFailedError(RuntimeError):
    """A job failed in every attempt."""


class OutsideFailureError(JobFailedError, ValueError):
    """A job failed in every attempt for a reason outside the code: the machine, a server, what a policy answered.

    The last attempt raised an error meant for users (a ValueError class of this project), or its process died or
    hung. So the message is all that a user needs.
    """


def _job_failed(message: str, error: Exception) -> JobFailedError:
    """The error for a job, or a start, whose last attempt failed with `error`."""
    cause = getattr(error, "cause", None)
    for_users = isinstance(cause, ValueError) and type(cause).__module__.partition(".")[0] == "ipvla"
    kind = OutsideFailureError if cause is None or for_users else JobFailedError
    return kind(f"{message}; last: {_reason(error)}")


class _Host:
    """The actor: a worker's process."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._worker = make_worker()

    def run(self, job: Any) -> Any:
        return self._worker.run(job)


@dataclass(eq=False)
class _Slot:
    """One place in the pool; its actor is replaced when it dies."""

    actor: Any = None
    group: str | None = None


@dataclass(frozen=True)
class _Running(Generic[Job]):
    slot: _Slot
    job: Job
    attempt: int
    started: float


class _Starting(dict["ray.ObjectRef[Any]", _Slot]):
    """Slots whose actors are not ready: their processes load, or wait until the cluster has a CPU for them.

    No job waits for one of them: after the loss of a node some may never start, and the others do the work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patience(math.inf, 1)

    def patience(self, timeout_s: float, most_failures: int) -> None:
        """From now on: how long to wait for one of them, and how many may fail in a row."""
        self.failures, self._changed = 0, time.monotonic()
        self._timeout_s, self._most_failures = timeout_s, most_failures

    def add(self, slot: _Slot, ready: ray.ObjectRef[Any]) -> None:
        self[ready] = slot
        self._changed = time.monotonic()

    def take(self, ready: ray.ObjectRef[Any]) -> _Slot:
        self._changed = time.monotonic()
        return self.pop(ready)

    def failed(self, error: Exception) -> None:
        """JobFailedError, if that was once too often in a row."""
        self.failures += 1
        if self.failures >= self._most_failures:
            raise _job_failed(f"{self.failures} simulator processes in a row did not start", error) from error

    def require_time(self) -> None:
        """JobFailedError, if nothing has started for too long, with nothing else at work."""
        if time.monotonic() - self._changed > self._timeout_s:
            raise OutsideFailureError(
                f"no simulator process has started for {self._timeout_s:.0f} s: the cluster has no free CPU for "
                "one (a node may be lost); free some, or ask for fewer per simulator"
            )


def simulator_environment(suite: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a process that simulates beside others: no CUDA, one thread, and what its suite needs.

    Args:
        suite: the suite's own variables (`SuiteFacts.environment`); None for MuJoCo's.

    Raises:
        SimulatorError: MUJOCO_GL or PYOPENGL_PLATFORM cannot be used.
    """
    return {
        "CUDA_VISIBLE_DEVICES": "",  # Ray does not hide GPUs from actors that ask for none
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **(gl_environment() if suite is None else suite),
    }


def cluster_cores() -> int:
    """CPUs of the connected cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_room(simulator_bytes: int) -> int:
    """Simulators of this size that the connected cluster has memory for, at least 1."""
    return max(1, int(ray.cluster_resources()["memory"] // simulator_bytes))


def simulators_for(cores: int, waiting: float, policy_busy: float, room: int) -> int:
    """The number of simulators, from measurements with one per core.

    A simulator needs a core while it does not wait for the policy; n of them keep the cores busy once
    n (1 - waiting) = cores.

    Args:
        cores: cores that simulators may use.
        waiting: share of the simulators' time that they wait for the policy, in [0, 1].
        policy_busy: share of the time that the policy works, in [0, 1].
        room: simulators that fit into memory, at least 1.

    Returns:
        In cores .. MOST_PER_CORE * cores, or `room` if that is less.
    """
    if policy_busy > _SATURATED:
        return min(cores, room)
    enough = math.ceil(cores / max(1 - waiting, 1 / MOST_PER_CORE) - 1e-9)
    return min(max(enough, cores), MOST_PER_CORE * cores, room)


class AffinityQueue(Generic[Job]):
    """Jobs in groups (episodes by task); within a group they leave in the order in which they came."""

    def __init__(self, jobs: Iterable[Job], group: Callable[[Job], str]) -> None:
        self._group = group
        self._queues: dict[str, deque[Job]] = {}
        for job in jobs:
            self._queues.setdefault(group(job), deque()).append(job)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def take(self, known: str | None) -> Job:
        """The next job for a worker whose last job was of group `known`. Raises IndexError if none waits."""
        if not self:
            raise IndexError("no job waits")
        if known is None or not self._queues.get(known):
            known = max(self._queues, key=lambda name: len(self._queues[name]))
        return self._queues[known].popleft()

    def put_back(self, job: Job) -> None:
        """To the front of its group."""
        self._queues[self._group(job)].appendleft(job)


class WorkerPool:
    """N actors that live as long as the pool, started when there is work for them.

    Args:
        make_worker: picklable; called once in each actor.
        cpus_per_worker: what an actor asks Ray for. By default 1, or an equal share of the machine if the
            cluster is a single machine with fewer cores than workers (it would wait for ever otherwise).
        job_timeout_s: a job that takes longer counts as failed and its actor as hung.
        start_timeout_s: how long to wait, with nothing else at work, for any actor to start (a process loads its
            packages and, on a full cluster, waits for a CPU first).
        environment: see `simulator_environment`.
        python: interpreter of the actors' processes, of the same versions of Python and Ray; empty for this one.

    Raises:
        ValueError: fewer than one worker, or no time for a job or a start.
    """

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        num_workers: int,
        *,
        cpus_per_worker: float | None = None,
        job_timeout_s: float = 900.0,
        start_timeout_s: float = 900.0,
        environment: Mapping[str, str] | None = None,
        python: str = "",
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"a pool of {num_workers} simulators cannot run anything; pass num_simulators >= 1")
        if job_timeout_s <= 0:
            raise ValueError(f"a job cannot end within {job_timeout_s} s; give it more than 0")
        if start_timeout_s <= 0:
            raise ValueError(f"no process can start within {start_timeout_s} s; give it more than 0")
        self._make_worker = make_worker
        self._slots = [_Slot() for _ in range(num_workers)]
        self._added: list[_Slot] = []
        self._starting = _Starting()
        self._cpus = cpus_per_worker
        self._job_timeout_s = job_timeout_s
        self._start_timeout_s = start_timeout_s
        self._runtime: dict[str, Any] = {"env_vars": simulator_environment(environment)}
        if python:
            self._runtime["py_executable"] = python

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, count: int) -> None:
        """Adds `count` workers, also while jobs run."""
        new = [_Slot() for _ in range(count)]
        self._slots += new
        self._added += new

    def start(self, max_attempts: int = 3) -> None:
        """Starts every worker that has no process now, and waits until all have one; `map` does not wait.

        Raises:
            JobFailedError: starts failed `max_attempts` times in a row, or none came within `start_timeout_s`.
        """
        starting = self._starting
        starting.patience(self._start_timeout_s, max_attempts)
        cold = [slot for slot in self._slots if slot.actor is None]
        while cold or starting:
            for slot in cold:
                starting.add(slot, self._start(slot))
            started = [self._started(reference) for reference, _ in self._finished({})]
            cold = [slot for slot in started if slot.actor is None]

    def map(
        self,
        jobs: Sequence[Job],
        *,
        group: Callable[[Job], str] = lambda job: "",
        name: Callable[[Job], str] = str,
        prepare: Callable[[Job, int], Any] = lambda job, attempt: job,
        max_attempts: int = 3,
    ) -> Iterator[tuple[Job, Any]]:
        """Yields (job, result) as jobs end.

        Args:
            group: a worker keeps to one group while it has work (its simulator is loaded).
            name: the job's name in errors; unique.
            prepare: (job, attempt from 0) -> what the worker's `run` receives; called before every attempt,
                so it may also clean up after a failed one.

        Raises:
            JobFailedError: a job, or an actor's start, failed `max_attempts` times, chained to the last failure;
                or nothing runs, and no actor has started for `start_timeout_s`.
        """
        queue = AffinityQueue(jobs, group)
        attempts: dict[str, int] = {}
        running: dict[ray.ObjectRef[Any], _Running[Job]] = {}
        starting = self._starting
        starting.patience(self._start_timeout_s, max_attempts)
        idle, self._added = [slot for slot in self._slots if slot not in starting.values()], []
        try:
            while queue or running:
                idle, self._added = idle + self._added, []
                ready = [slot for slot in idle if slot.actor is not None]
                cold = [slot for slot in idle if slot.actor is None]
                for slot in cold[: max(len(queue) - len(ready) - len(starting), 0)]:
                    idle.remove(slot)
                    starting.add(slot, self._start(slot))
                for slot in ready[: len(queue)]:
                    idle.remove(slot)
                    job = queue.take(slot.group)
                    slot.group = group(job)
                    attempt = attempts.get(name(job), 0)
                    reference = slot.actor.run.remote(prepare(job, attempt))
                    running[reference] = _Running(slot, job, attempt, time.monotonic())
                for reference, overdue in self._finished(running):
                    if reference in starting:
                        idle.append(self._started(reference))
                        continue
                    done = running.pop(reference)
                    idle.append(done.slot)
                    try:
                        result = ray.get(reference, timeout=0 if overdue else None)
                    except (ray.exceptions.RayError, TimeoutError) as error:
                        self._after_failure(done, error)
                        attempts[name(done.job)] = done.attempt + 1
                        if done.attempt + 1 >= max_attempts:
                            message = f"{name(done.job)} failed {max_attempts} times"
                            raise _job_failed(message, error) from error
                        _logger.warning("%s failed and runs again: %s", name(done.job), _reason(error))
                        queue.put_back(done.job)
                    else:
                        yield done.job, result
        finally:
            for left in running.values():  # unfinished work must not reach the next run
                self._discard(left.slot)

    def close(self) -> None:
        for slot in self._slots:
            self._discard(slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, slot: _Slot) -> ray.ObjectRef[Any]:
        # "DEFAULT": outside the resources that a trial of a sweep has reserved for itself.
        options = {
            "num_cpus": self._share(),
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "DEFAULT",
        }
        host = ray.remote(_Host).options(runtime_env=self._runtime, **options)
        slot.actor = host.remote(self._make_worker)
        reference: ray.ObjectRef[Any] = slot.actor.__ray_ready__.remote()
        return reference

    def _started(self, reference: ray.ObjectRef[Any]) -> _Slot:
        """The slot; its actor is ready, or gone if it died before."""
        slot = self._starting.take(reference)
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            self._discard(slot)
            self._starting.failed(error)
        else:
            self._starting.failures = 0
        return slot

    def _share(self) -> float:
        if self._cpus is not None:
            return self._cpus
        alive = [node for node in ray.nodes() if node["Alive"]]
        cores = sum(float(node["Resources"].get("CPU", 0)) for node in alive)
        return min(1.0, cores / len(self._slots)) if len(alive) == 1 and cores else 1.0

    def _finished(
        self, running: Mapping[ray.ObjectRef[Any], _Running[Any]]
    ) -> list[tuple[ray.ObjectRef[Any], bool]]:
        """(job or start, whether its time is up) of those that have ended or are late; waits at most a second."""
        ready, waiting = ray.wait([*running, *self._starting], num_returns=1, timeout=_POLL_S)
        deadline = time.monotonic() - self._job_timeout_s
        late = [one for one in waiting if one in running and running[one].started < deadline]
        if not ready and not running:
            self._starting.require_time()
        return [(reference, False) for reference in ready] + [(reference, True) for reference in late]

    def _after_failure(self, done: _Running[Any], error: Exception) -> None:
        # An exception leaves the process sound (the worker has dropped its simulator); anything else does not.
        if not isinstance(error, ray.exceptions.RayTaskError):
            self._discard(done.slot)

    def _discard(self, slot: _Slot) -> None:
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor, slot.group = None, None


def _reason(error: Exception) -> str:
    """The last cause, in one line."""
    if isinstance(error, TimeoutError):
        return "it did not finish in time (the simulator hangs?)"
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    # Of one that was raised while an actor began, Ray appends the traceback.
    text = lines[-1] if getattr(cause, "actor_init_failed", False) else " ".join(" ".join(lines).split())
    return f"{type(cause).__name__}: {textwrap.shorten(text, _LONGEST_REASON, placeholder=' ...')}"
