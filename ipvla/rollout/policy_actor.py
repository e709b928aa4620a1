"""The policy as a Ray actor: one model, many simulators that wait for it.

A process that holds an actor's handle imports its class. So that a simulator's process needs no torch, the model's
side is imported where an actor starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from ipvla.contract import Contract, fitted
from ipvla.rollout.endpoint import Service, Serving
from ipvla.rollout.episode import Answer, Chunk, EpisodeId, InvalidActionError
from ipvla.types import Observation

if TYPE_CHECKING:
    from ipvla.rollout.policy_server import BatchPolicy, PolicyServer, Request

_PING_TIMEOUT_S = 60.0
#: Of replicas, before it is no accident that all of them die.
_STARTS = 5
_DEFAULT = Serving()
#: How often a new episode that waits for room checks for leases that have run out.
_EXPIRY_POLL_S = 5.0


@dataclass(frozen=True)
class PolicySource:
    """Where an actor loads its policy from: small enough to send again when the actor is replaced.

    Attributes:
        load: `ipvla.policy.Policy.load`, or another picklable function of the directory.
        directory: the policy's checkpoint, readable where the actor runs.
        variant: what else decides its actions besides the files; part of the hash.
    """

    load: Callable[[Path], BatchPolicy]
    directory: Path
    variant: str | None = field(default=None, kw_only=True)

    def open(self) -> BatchPolicy:
        return self.load(self.directory)

    def sha256(self) -> str:
        """One hash of every file's name and content below the directory, and of the variant."""
        from ipvla.policy import policy_sha256

        files = policy_sha256(Path(self.directory))
        return files if self.variant is None else hashlib.sha256(f"{files} {self.variant}".encode()).hexdigest()

    def view(self, offered: Contract, world: str = "the world") -> Contract:
        """The policy's terms, of which pictures and state are converted; its actions are in the simulator's units.

        A directory without `policy.json` holds a policy of another kind: it is shown what the protocol shows.

        Raises:
            ContractError: the policy does not fit the suite.
        """
        from ipvla.policy import policy_contract

        contract = policy_contract(Path(self.directory))
        if contract is None:
            return offered.in_environment_units.pictures_alone
        return fitted(contract, offered, f"the policy in {self.directory}", world)

    def serve(self, serving: Serving, running: Service | None = None) -> PolicyService:
        """Actors that start when they are first asked, or those of the policy before it."""
        if isinstance(running, PolicyService):
            service = running
            service.switch(self)
        else:
            if running is not None:
                running.close()
            service = PolicyService(self, serving)
        service.view = serving.view(self)
        return service


class PolicyDiedError(RuntimeError):
    """Every process of the policy died before it could answer."""


class PolicyActor:
    """Answers all waiting requests as soon as the model is free: no timer, so a lone caller is never delayed.

    Args:
        capacity, lease_s: see `PolicyServer`. A new episode waits for room, and may wait long.
        max_batch: observations of a forward pass; None for as many as wait.
    """

    def __init__(
        self,
        source: PolicySource,
        threads: int,
        capacity: int | None = None,
        lease_s: float = 900.0,
        max_batch: int | None = None,
    ) -> None:
        import torch

        from ipvla.rollout.policy_server import ActTime

        self._max_batch = max_batch
        self._limits = (capacity, lease_s)
        self._acting = ActTime()
        # One thread: torch's thread count and CUDA's stream belong to the thread that set them.
        self._model_thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self._server = self._model_thread.submit(self._opened, source).result()
        self._room = asyncio.Event()
        self._waiting: list[tuple[Request, asyncio.Future[Chunk | Answer]]] = []
        self._answering: asyncio.Task[None] | None = None
        self._started = time.perf_counter()
        self._forwards, self._requests, self._busy_s = 0, 0, 0.0

    async def load(self, source: PolicySource) -> None:
        """Answers with another policy once it is loaded; episodes that are under way then are refused."""
        from ipvla.rollout.policy_server import StaleEpisodeError

        self._server = await asyncio.get_running_loop().run_in_executor(self._model_thread, self._opened, source)
        for _, answer in self._waiting:  # admitted by the former server
            if not answer.done():
                answer.set_exception(StaleEpisodeError("another policy was loaded; run the episode again"))
        self._waiting.clear()
        self._room.set()

    def _opened(self, source: PolicySource) -> PolicyServer:
        from ipvla.rollout.policy_server import PolicyServer

        return PolicyServer(source.open(), *self._limits, self._acting)

    async def act(self, episode_id: EpisodeId, policy_step: int, observation: Observation) -> Chunk | Answer:
        """Float32 [execute, A], or the whole chunk to an observation with something `ahead`.

        Raises:
            StaleEpisodeError: the step does not follow the episode's last one.
            InvalidActionError: the policy's actions are not finite; the memory is as before.
        """
        while policy_step == 0 and episode_id not in self._server and not await self._has_room():
            pass
        request = self._server.admit(episode_id, policy_step, observation, time.monotonic())
        answer: asyncio.Future[Chunk | Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_waiting())
        return await answer

    async def _answer_waiting(self) -> None:
        while self._waiting:
            batch = self._waiting[: self._max_batch]
            del self._waiting[: len(batch)]
            started = time.perf_counter()
            try:
                chunks = await asyncio.get_running_loop().run_in_executor(
                    self._model_thread, self._server.forward, [request for request, _ in batch]
                )
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            finally:
                self._busy_s += time.perf_counter() - started
                self._forwards, self._requests = self._forwards + 1, self._requests + len(batch)
            for (_, answer), chunk in zip(batch, chunks, strict=True):
                if answer.done():  # cancelled: its caller went away
                    continue
                if isinstance(chunk, InvalidActionError):
                    answer.set_exception(chunk)
                else:
                    answer.set_result(chunk)

    async def end(self, episode_id: EpisodeId) -> None:
        """Frees the episode's memory."""
        self._server.end(episode_id)
        self._room.set()

    async def _has_room(self) -> bool:
        """Whether a new episode may begin; if not, returns once something has changed."""
        self._server.expire(time.monotonic())
        if not self._server.full:
            return True
        self._room.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._room.wait(), _EXPIRY_POLL_S)
        return False

    async def stats(self) -> dict[str, float]:
        """`forwards`, `requests`, `mean_batch`, `forward_s` (their wall time, gathering and scattering of memory
        and the way to the model's thread included), `busy` (its share of all time), `act_s` and `act_cpu_s` (the
        policy's own part: wall time, and CPU time of the model's thread), `episodes` (under way).
        """
        return {
            "forwards": self._forwards,
            "requests": self._requests,
            "mean_batch": self._requests / max(self._forwards, 1),
            "forward_s": self._busy_s,
            "act_s": self._acting.wall_s,
            "act_cpu_s": self._acting.cpu_s,
            "busy": self._busy_s / (time.perf_counter() - self._started),
            "episodes": len(self._server),
        }


@dataclass
class PolicyClient:
    """Asks the policy actor that an episode is pinned to."""

    actor: Any

    def act(self, episode_id: EpisodeId, observation: Observation, policy_step: int) -> Chunk | Answer:
        """As `PolicyActor.act`, with its errors in Ray's wrapping."""
        chunk: Chunk | Answer = ray.get(self.actor.act.remote(episode_id, policy_step, observation))
        return chunk

    def end(self, episode_id: EpisodeId) -> None:
        """Returns once the episode's memory is freed. The memory of a dead process counts as freed."""
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(self.actor.end.remote(episode_id))


class PolicyService:
    """The driver's side: starts the actors when they are first needed and replaces those that are dead."""

    view: Contract | None = None

    def __init__(self, source: PolicySource, serving: Serving = _DEFAULT) -> None:
        self.source = source
        #: Of every `PolicyActor`, after its source.
        self.arguments = (serving.threads, serving.capacity, serving.lease_s, serving.max_batch)
        self._threads = serving.threads
        self._options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": "DEFAULT", **serving.resources}
        self._replicas: list[Any] = [None] * serving.replicas
        self._loading: dict[int, ray.ObjectRef[Any]] = {}

    def client(self) -> PolicyClient:
        """Of the replica with the fewest episodes, for one episode; one that is dead is replaced.

        Raises:
            PolicyDiedError: the replicas' processes end again and again while they load.
            ray.exceptions.ActorDiedError: the policy does not load, and says why.
        """
        for _ in range(_STARTS):
            self._fill_places()
            stats = self._answers()
            if stats:
                fewest = min(stats, key=lambda place: stats[place]["episodes"])
                return PolicyClient(self._replicas[fewest])
        raise PolicyDiedError(
            f"the process of the policy in {self.source.directory} ended {_STARTS} times while it loaded; "
            "Ray's log may say why (out of memory?)"
        )

    def _fill_places(self) -> None:
        """Starts the missing replicas; waits for them only if no other could answer."""
        for place, actor in enumerate(self._replicas):
            if actor is None:
                self._replicas[place] = self._start()
                self._loading[place] = self._replicas[place].stats.remote()
        none_loaded = len(self._loading) == len(self._replicas)
        places = {first_answer: place for place, first_answer in self._loading.items()}
        timeout = None if none_loaded else 0
        loaded = ray.wait(list(places), num_returns=len(places), timeout=timeout)[0] if places else []
        for first_answer in loaded:
            del self._loading[places[first_answer]]
            try:
                ray.get(first_answer)
            except ray.exceptions.RayActorError as error:
                self._replicas[places[first_answer]] = None
                if error.actor_init_failed:
                    raise

    def switch(self, source: PolicySource) -> None:
        """Serves another policy, without starting actors anew; no episode may be under way."""
        if source != self.source:
            try:
                ray.get([actor.load.remote(source) for actor in self._replicas if actor is not None])
            except ray.exceptions.RayActorError:
                self.close()
        self.source = source

    def stats(self) -> dict[str, float]:
        """Summed over replicas, `mean_batch` and `busy` their means; empty while none has been needed or lives."""
        answers = list(self._answers().values())
        if not answers:
            return {}
        sums = {name: sum(stats[name] for stats in answers) for name in answers[0]}
        sums["mean_batch"] = sums["requests"] / max(sums["forwards"], 1)
        sums["busy"] /= len(answers)
        return sums

    def _answers(self, timeout_s: float = _PING_TIMEOUT_S) -> dict[int, dict[str, float]]:
        """By place the `stats` of the replicas that answer; the others are ended, and started anew when needed."""
        requests = {
            place: actor.stats.remote()
            for place, actor in enumerate(self._replicas)
            if actor is not None and place not in self._loading
        }
        stats = {}
        for place, answer in requests.items():
            try:
                stats[place] = ray.get(answer, timeout=timeout_s)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                ray.kill(self._replicas[place])
                self._replicas[place] = None
        return stats

    def close(self) -> None:
        for actor in self._replicas:
            if actor is not None:
                ray.kill(actor)
        self._replicas, self._loading = [None] * len(self._replicas), {}

    def _start(self) -> Any:
        environment = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if not self._options.get("num_gpus"):
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return (
            ray.remote(PolicyActor)
            # An answer must not be repeated behind our back: it has moved an episode's memory.
            .options(max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment}, **self._options)
            .remote(self.source, *self.arguments)
        )
