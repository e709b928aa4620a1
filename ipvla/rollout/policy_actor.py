"""The policy as a Ray actor: one model, many simulators that wait for it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from ipvla.rollout.episode import Chunk
from ipvla.rollout.policy_server import Policy, PolicyServer, Request
from ipvla.types import Observation

_PING_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PolicySource:
    """Where an actor gets its policy from: small enough to be sent again whenever the actor is replaced.

    Attributes:
        load: `ipvla.policy.Policy.load`, or another picklable function of the directory.
        directory: the policy's checkpoint, readable where the actor runs.
    """

    load: Callable[[Path], Policy]
    directory: Path

    def open(self) -> Policy:
        return self.load(self.directory)

    def sha256(self) -> str:
        """One hash of every file's name and content below the directory."""
        digest = hashlib.sha256()
        for path in sorted(p for p in Path(self.directory).rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(self.directory)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


class PolicyActor:
    """Answers whoever waits as soon as the model is free: no timer, so a lone caller is never delayed."""

    def __init__(self, source: PolicySource, threads: int) -> None:
        torch.set_num_threads(threads)
        self._server = PolicyServer(source.open())
        # One thread: torch's thread count and CUDA's stream belong to the thread that set them.
        self._model_thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self._waiting: list[tuple[Request, asyncio.Future[Chunk]]] = []
        self._answering: asyncio.Task[None] | None = None
        self._started = time.perf_counter()
        self._forwards, self._requests, self._busy_s = 0, 0, 0.0

    async def load(self, source: PolicySource) -> None:
        """Answers with another policy from now on; episodes that are under way are forgotten and refused."""
        self._server = PolicyServer(source.open())

    async def act(self, episode_id: str, policy_step: int, observation: Observation) -> Chunk:
        """Float32 [execute, A]. Raises StaleEpisodeError if the step does not follow the episode's last."""
        request = self._server.admit(episode_id, policy_step, observation)
        answer: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_waiting())
        return await answer

    async def _answer_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
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
                if not answer.done():  # cancelled, if its caller went away
                    answer.set_result(chunk)

    async def end(self, episode_id: str) -> None:
        self._server.end(episode_id)

    async def stats(self) -> dict[str, float]:
        """`forwards`, `requests`, `mean_batch`, `busy` (share of the wall time), `episodes` (under way)."""
        return {
            "forwards": self._forwards,
            "requests": self._requests,
            "mean_batch": self._requests / max(self._forwards, 1),
            "busy": self._busy_s / (time.perf_counter() - self._started),
            "episodes": len(self._server),
        }


@dataclass(frozen=True)
class PolicyClient:
    """What a simulator worker holds of the policy actor."""

    actor: Any

    def act(self, episode_id: str, observation: Observation, policy_step: int) -> Chunk:
        chunk: Chunk = ray.get(self.actor.act.remote(episode_id, policy_step, observation))
        return chunk

    def end(self, episode_id: str) -> None:
        """Returns once the episode's memory is freed."""
        ray.get(self.actor.end.remote(episode_id))


class PolicyService:
    """The driver's side: starts the actor when it is first needed and replaces it when it is dead.

    Args:
        threads: CPU threads of the forward pass.
        resources: `ray.remote` options such as `{"num_gpus": 1}`; by default the actor asks for no resources,
            as it works only while simulators wait for it.
    """

    def __init__(
        self, source: PolicySource, *, threads: int = 1, resources: Mapping[str, float] | None = None
    ) -> None:
        self.source = source
        self._threads = threads
        self._options: dict[str, Any] = {"num_cpus": 0, **(resources or {})}
        self._actor: Any = None

    def client(self) -> PolicyClient:
        if self._actor is None:
            environment = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            if not self._options.get("num_gpus"):
                environment["CUDA_VISIBLE_DEVICES"] = ""
            self._actor = (
                ray.remote(PolicyActor)
                # An answer must not be repeated behind our back: it has moved an episode's memory.
                .options(
                    max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment}, **self._options
                )
                .remote(self.source, self._threads)
            )
            ray.get(self._actor.stats.remote())  # a policy that does not load says so here
        return PolicyClient(self._actor)

    def switch(self, source: PolicySource) -> None:
        """Serves another policy, without starting an actor anew; no episode may be under way."""
        if self._actor is not None and source != self.source:
            try:
                ray.get(self._actor.load.remote(source))
            except ray.exceptions.RayActorError:
                self.close()
        self.source = source

    def heal(self) -> PolicyClient:
        """The client of an actor that answers: the present one, or its replacement if it is dead or hangs."""
        if self._actor is not None:
            try:
                ray.get(self._actor.stats.remote(), timeout=_PING_TIMEOUT_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                self.close()
        return self.client()

    def stats(self) -> dict[str, float]:
        """See `PolicyActor.stats`; empty while no actor has been needed."""
        stats: dict[str, float] = ray.get(self._actor.stats.remote()) if self._actor is not None else {}
        return stats

    def close(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
