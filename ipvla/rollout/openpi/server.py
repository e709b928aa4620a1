"""A policy behind a websocket: one memory per connection, or per session that outlives its connections.

A message is an observation, the answer a chunk of actions; text instead of bytes says what was wrong with the
message, and the connection stays. Whose episode an observation belongs to:

- a connection has an episode of its own, from its first observation on;
- `session_id` in every message names one that another connection may take up within the lease, after this one;
- `reset: true` ends the episode and begins the next with this observation.

Sessions live as long as their connection, and their lease after it. Where there are too many, the one that was
heard from longest ago makes room, unless it is the one that an open connection used last.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import ipaddress
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ipvla.contract import Limits
from ipvla.rollout.episode import Answer, Chunk, EpisodeId, InvalidActionError
from ipvla.rollout.openpi.messages import (
    EXECUTE,
    LAST_STEP,
    RESET,
    SESSION,
    TOKEN_VARIABLE,
    MessageError,
    ObservationError,
    cut,
    pack,
    unpack,
)
from ipvla.types import Observation

_logger = logging.getLogger(__name__)

_HEALTH: Final = "/healthz"
_LONGEST_NAME: Final = 200
#: Of an answer that refuses a message.
_LONGEST_REFUSAL: Final = 1000
#: Threads that read messages beside the event loop, which answers all others meanwhile.
_READERS: Final = 2
#: Sessions that one open connection may hold: the arms of a robot, say.
_SESSIONS_PER_CONNECTION: Final = 8


class SessionError(ValueError):
    """A message's session is another connection's."""


class AnswersEpisodes(Protocol):
    """Who has the memories; `ipvla.rollout.policy_actor.PolicyActor` in production."""

    async def act(self, episode_id: EpisodeId, policy_step: int, observation: Observation) -> Any: ...
    async def end(self, episode_id: EpisodeId) -> Any: ...


@dataclass(frozen=True)
class ServerConfig:
    """Where a policy is served, and to how many.

    Attributes:
        host: address to listen on; beyond this machine only with a token.
        port: 0 for any that is free.
        max_message_mib: a larger message ends its connection.
        max_sessions: connections, and episodes, at a time. Of more episodes the one that was heard from longest
            ago is forgotten; that of an open connection's last message never is.
        lease_s: seconds that a named session lives without a connection.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_message_mib: float = 16.0
    max_sessions: int = 64
    lease_s: float = 900.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; choose one in 1024..65535, or 0 for any")
        for name in ("max_message_mib", "max_sessions", "lease_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass
class _Session:
    """What is known of an episode.

    Attributes:
        connection: None once that has closed.
        heard_s: of its last message, or when its connection closed.
        policy_step, t: of the next observation.
        sent, sent_t: the last chunk, of which the client plays what it likes, and its first action's control step.
    """

    name: str
    connection: ServerConnection | None
    heard_s: float
    episode: int = 0
    policy_step: int = 0
    t: int = 0
    sent: Chunk | None = None
    sent_t: int = 0

    @property
    def episode_id(self) -> EpisodeId:
        return EpisodeId(self.name, self.episode)

    def last_action(self, t: int) -> Chunk | None:
        """The action that the client has played before control step `t`, [A]; None at an episode's start."""
        if self.sent is None:
            return None
        played = t - self.sent_t
        return self.sent[min(max(played, 1), len(self.sent)) - 1]  # type: ignore[no-any-return]


class PolicyWebsocketServer:
    """See the module's docstring.

    Args:
        policy: where the memories are.
        observe: (message, t) -> what the policy can use; ValueError says what was wrong with the message. It runs
            in threads beside the event loop.
        metadata: sent to every client that connects.
        token: clients must send it as `Authorization: Api-Key TOKEN`; None to accept every client.
        limits: that every action keeps to; None for those that the policy's units have.

    Raises:
        ValueError: others than this machine could connect without a token.
    """

    def __init__(
        self,
        config: ServerConfig,
        policy: AnswersEpisodes,
        observe: Callable[[Any, int], Observation],
        metadata: Mapping[str, Any],
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        if not token and not config.is_loopback:
            raise ValueError(
                f"host {config.host} lets others than this machine in; set {TOKEN_VARIABLE}, or serve at 127.0.0.1"
            )
        self._config, self._policy, self._observe = config, policy, observe
        self._token, self._limits = token, limits
        #: The message that every client gets first, if it gets one.
        self.greeting: bytes | None = pack(dict(metadata))
        self._sessions: dict[str, _Session] = {}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._requests, self._refused = 0, 0
        self._connections = 0
        self._server: Server | None = None

    async def start(self) -> int:
        """Listens; returns the port. ValueError if that cannot be had."""
        try:
            self._server = await serve(
                self._converse,
                self._config.host,
                self._config.port,
                process_request=self._admit,
                compression=None,  # pictures hardly get smaller
                max_size=int(self._config.max_message_mib * 2**20),
            )
        except OSError as error:
            raise ValueError(
                f"cannot listen at {self._config.host}:{self._config.port} ({error}); "
                "choose another server.port, or end the process that has it"
            ) from None
        return int(next(iter(self._server.sockets)).getsockname()[1])

    async def stop(self) -> None:
        """Answers what is under way, and closes every connection (code 1001)."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def status(self) -> dict[str, Any]:
        """The content of `/healthz`."""
        return {
            "status": "ok",
            "connections": self._connections,
            "sessions": len(self._sessions),
            "requests": self._requests,
            "refused": self._refused,
        }

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == _HEALTH:
            return connection.respond(http.HTTPStatus.OK, json.dumps(self.status()) + "\n")
        if self._token:
            _, _, key = request.headers.get("Authorization", "").partition(" ")
            if not hmac.compare_digest(key.encode(), self._token.encode()):
                text = "this server wants `Authorization: Api-Key TOKEN` (api_key of openpi's client)\n"
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
        if self._connections >= self._config.max_sessions:
            text = f"{self._connections} connections are open, and no more are taken; try again later\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        self._connections += 1
        try:
            if self.greeting is not None:
                await connection.send(self.greeting)
            async for message in connection:
                if (answer := await self._answer(connection, message)) is not None:
                    await connection.send(answer)
        except ConnectionClosed as closed:
            ended_here = closed.sent is not None and not closed.rcvd_then_sent
            _logger.info("%s: %s", connection.remote_address, closed if ended_here else "client left")
        finally:
            self._connections -= 1
            await self._left(connection)

    async def _answer(self, connection: ServerConnection, message: str | bytes) -> str | bytes | None:
        self._requests += 1
        try:
            if isinstance(message, str):
                raise MessageError("a text message; send observations as msgpack bytes")
            return await self._reply(connection, message)
        except InvalidActionError as error:
            _logger.error("%s", error)
            text = str(error)
        except ValueError as error:  # the client's
            text = f"{error!s:.{_LONGEST_REFUSAL}}"
        except Exception as error:  # the policy's; other episodes go on
            _logger.exception("the policy failed")
            text = (
                f"the policy failed ({type(error).__name__}: {error!s:.{_LONGEST_REFUSAL}}); see its server's log"
            )
        self._refused += 1
        return self._refusal(connection, text)

    async def _reply(self, connection: ServerConnection, message: bytes) -> bytes | None:
        """The answer to a message; None for one that is not answered."""
        began = time.perf_counter()
        answer = await self._act(connection, await self._read(unpack, message))
        answer["server_timing"] = {"infer_ms": 1e3 * (time.perf_counter() - began)}
        return pack(answer)

    def _refusal(self, connection: ServerConnection, text: str) -> str | bytes:
        """What a client gets in place of an answer."""
        return text

    async def _read(self, read: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, read, *arguments)

    async def _act(self, connection: ServerConnection, message: Any) -> dict[str, Any]:
        fields: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
        session = await self._session(connection, fields)
        begins = _flag(fields)
        observation = await self._read(self._observe, message, 0 if begins else session.t)
        # What fails ends no episode: the next one begins beside it.
        again = begins and session.policy_step > 0
        step = 0 if begins else session.policy_step
        episode_id = EpisodeId(session.name, session.episode + again)
        try:
            answer = await self._policy.act(episode_id, step, observation)
        except BaseException:
            if again:
                await self._policy.end(episode_id)
            raise
        if again:
            await self._policy.end(session.episode_id)
        chunk, execute = answer[:2] if isinstance(answer, Answer) else (answer, len(answer))
        if self._limits is not None:
            chunk = _kept(self._limits, chunk, observation, None if begins else session.last_action(observation.t))
        session.episode, session.policy_step, session.sent = episode_id.attempt, step + 1, chunk
        session.sent_t, session.t = observation.t, min(observation.t + execute, LAST_STEP)
        return {
            "actions": chunk,
            "policy_step": step,
            **({} if observation.ahead is None else {EXECUTE: execute}),
        }

    async def _session(self, connection: ServerConnection, message: Mapping[str, Any]) -> _Session:
        """The session that a message belongs to, which is this connection's from now on."""
        name = message.get(SESSION)
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME):
            raise SessionError(f"{SESSION} is {cut(name)}; send a name of at most {_LONGEST_NAME} characters")
        key = f"connection {connection.id}" if name is None else f"session {name}"
        now_s = time.monotonic()
        await self._forget_silent(now_s)
        session = self._sessions.pop(key, None) or _Session(key, connection, now_s)
        if session.connection not in (connection, None):
            self._sessions[key] = session
            raise SessionError(
                f"{SESSION} {name!r} is in use by another connection; close that one, or choose another name"
            )
        session.connection, session.heard_s = connection, now_s
        self._sessions[key] = session  # last, as the one that was heard from last
        await self._make_room(connection)
        return session

    async def _forget_silent(self, now_s: float) -> None:
        """Forgets sessions whose lease has run out."""
        for session in list(self._sessions.values()):
            if session.connection is None and now_s - session.heard_s > self._config.lease_s:
                await self._forget(session)

    async def _make_room(self, connection: ServerConnection) -> None:
        """Forgets those heard from longest ago: of too many, or of too many of this connection.

        The last one of every open connection stays. There is room for those: no more connections are let in.
        """
        last = {session.connection: session for session in self._sessions.values()}  # in the order of hearing
        spare = [s for s in self._sessions.values() if s.connection is None or s is not last[s.connection]]
        own = [session for session in spare if session.connection is connection]
        surplus = own[: max(0, len(own) + 1 - _SESSIONS_PER_CONNECTION)]
        too_many = len(self._sessions) - len(surplus) - self._config.max_sessions
        rest = [session for session in spare if session not in surplus]
        for session in surplus + rest[: max(0, too_many)]:
            await self._forget(session)

    async def _left(self, connection: ServerConnection) -> None:
        """Named sessions wait for another connection, that of the connection itself has ended."""
        for session in [one for one in self._sessions.values() if one.connection is connection]:
            if session.name.startswith("connection "):
                await self._forget(session)
            else:
                session.connection, session.heard_s = None, time.monotonic()
                self._sessions[session.name] = self._sessions.pop(session.name)

    async def _forget(self, session: _Session) -> None:
        self._sessions.pop(session.name, None)
        await self._policy.end(session.episode_id)


def _kept(limits: Limits, chunk: Chunk, observation: Observation, before: Chunk | None) -> Chunk:
    """A chunk within limits; what is played of it follows the last action that is played meanwhile."""
    ahead = observation.ahead
    if ahead is None or not 0 < ahead.delay <= min(len(ahead.actions), len(chunk) - 1):
        return limits.kept(chunk, before)
    meanwhile, played = chunk[: ahead.delay], chunk[ahead.delay :]
    return np.concatenate([limits.kept(meanwhile, before), limits.kept(played, ahead.actions[ahead.delay - 1])])


def _flag(message: Mapping[str, Any]) -> bool:
    value = message.get(RESET, False)
    if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
        raise ObservationError(f"{RESET} is {cut(value)}; send true or false")
    return bool(value)


async def serve_until(stop: asyncio.Event, server: PolicyWebsocketServer, on_start: Callable[[int], None]) -> None:
    """Serves until `stop` is set; `on_start` gets the port."""
    on_start(await server.start())
    try:
        await stop.wait()
    finally:
        await server.stop()
