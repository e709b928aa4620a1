"""A policy behind a websocket: one memory per connection, or per session that outlives its connections.

A message is an observation, the answer a chunk of actions; text instead of bytes says what was wrong with the
message, and the connection stays. Whose episode an observation belongs to:

- a connection has an episode of its own, from its first observation on;
- `session_id` in every message names one that another connection may take up within the lease, after this one;
- `reset: true` ends the episode and begins the next with this observation.
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
from dataclasses import dataclass
from typing import Any, Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.openpi.messages import (
    RESET,
    SESSION,
    TOKEN_VARIABLE,
    MessageError,
    ObservationError,
    pack,
    unpack,
)
from ipvla.types import Observation

_logger = logging.getLogger(__name__)

_HEALTH = "/healthz"
_LONGEST_NAME = 200


class SessionError(ValueError):
    """A message's session is taken, or there is no room for another one."""


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
        max_sessions: connections, and episodes, at a time.
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
    """Attributes: policy_step, t: of the next observation; left_s: when its connection went."""

    name: str
    connection: ServerConnection | None
    episode: int = 0
    policy_step: int = 0
    t: int = 0
    left_s: float = 0.0

    @property
    def episode_id(self) -> EpisodeId:
        return EpisodeId(self.name, self.episode)


class PolicyWebsocketServer:
    """See the module's docstring.

    Args:
        policy: where the memories are.
        observe: (message, t) -> what the policy can use; ValueError says what was wrong with the message.
        metadata: sent to every client that connects.
        token: clients must send it as `Authorization: Api-Key TOKEN`; None to accept every client.

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
    ) -> None:
        if not token and not config.is_loopback:
            raise ValueError(
                f"host {config.host} lets others than this machine in; set {TOKEN_VARIABLE}, or serve at 127.0.0.1"
            )
        self._config, self._policy, self._observe = config, policy, observe
        self._metadata, self._token = pack(dict(metadata)), token
        self._sessions: dict[str, _Session] = {}
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
            await connection.send(self._metadata)
            async for message in connection:
                await connection.send(await self._answer(connection, message))
        except ConnectionClosed as closed:
            ended_here = closed.sent is not None and not closed.rcvd_then_sent
            _logger.info("%s: %s", connection.remote_address, closed if ended_here else "client left")
        finally:
            self._connections -= 1
            await self._left(connection)

    async def _answer(self, connection: ServerConnection, message: str | bytes) -> str | bytes:
        self._requests += 1
        began = time.perf_counter()
        try:
            if isinstance(message, str):
                raise MessageError("a text message; send observations as msgpack bytes")
            answer = await self._act(connection, unpack(message))
        except ValueError as error:  # the client's
            self._refused += 1
            return str(error)
        except Exception as error:  # the policy's; other episodes go on
            self._refused += 1
            _logger.exception("the policy failed")
            return f"the policy failed ({type(error).__name__}: {error}); see its server's log"
        answer["server_timing"] = {"infer_ms": 1e3 * (time.perf_counter() - began)}
        return pack(answer)

    async def _act(self, connection: ServerConnection, message: Any) -> dict[str, Any]:
        fields: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
        session = await self._session(connection, fields)
        begins = _flag(fields)
        observation = self._observe(message, 0 if begins else session.t)
        if begins and session.policy_step:  # only now: a bad observation ends no episode
            await self._policy.end(session.episode_id)
            session.episode, session.policy_step = session.episode + 1, 0
        chunk = await self._policy.act(session.episode_id, session.policy_step, observation)
        step = session.policy_step
        session.policy_step, session.t = step + 1, observation.t + len(chunk)
        return {"actions": chunk, "policy_step": step}

    async def _session(self, connection: ServerConnection, message: Mapping[str, Any]) -> _Session:
        """The session that a message belongs to, which is this connection's from now on."""
        name = message.get(SESSION)
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME):
            raise SessionError(f"{SESSION} is {name!r:.60}; send a name of at most {_LONGEST_NAME} characters")
        key = f"connection {connection.id}" if name is None else f"session {name}"
        if key not in self._sessions:
            await self._make_room()
        # Another connection may have begun it meanwhile.
        session = self._sessions.setdefault(key, _Session(key, connection))
        if session.connection is not connection:
            if session.connection is not None:
                raise SessionError(
                    f"{SESSION} {name!r} is in use by another connection; close that one, or choose another name"
                )
            session.connection = connection
        return session

    async def _make_room(self) -> None:
        """Forgets sessions whose lease has run out. SessionError if there is no room even so."""
        expired = time.monotonic() - self._config.lease_s
        for session in list(self._sessions.values()):
            if session.connection is None and session.left_s < expired:
                await self._forget(session)
        if len(self._sessions) >= self._config.max_sessions:
            raise SessionError(f"{len(self._sessions)} sessions are open, and no more are taken; try again later")

    async def _left(self, connection: ServerConnection) -> None:
        """Named sessions wait for another connection, that of the connection itself has ended."""
        for session in [one for one in self._sessions.values() if one.connection is connection]:
            session.connection, session.left_s = None, time.monotonic()
            if session.name.startswith("connection "):
                await self._forget(session)

    async def _forget(self, session: _Session) -> None:
        self._sessions.pop(session.name, None)
        await self._policy.end(session.episode_id)


def _flag(message: Mapping[str, Any]) -> bool:
    value = message.get(RESET, False)
    if value not in (True, False):
        raise ObservationError(f"{RESET} is {value!r:.60}; send true or false")
    return bool(value)


async def serve_until(stop: asyncio.Event, server: PolicyWebsocketServer, on_start: Callable[[int], None]) -> None:
    """Serves until `stop` is set; `on_start` gets the port."""
    on_start(await server.start())
    try:
        await stop.wait()
    finally:
        await server.stop()
