"""An openpi server as the policy: the same episodes, journal and statistics, with the model elsewhere.

Every episode has its own connection, so a server may have a memory per connection, or none at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self

import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from ipvla.contract import Contract, fitted
from ipvla.rollout.chunk_player import Pace
from ipvla.rollout.chunking import HeadFacts
from ipvla.rollout.endpoint import ClientService, Service, Serving
from ipvla.rollout.episode import Answer, Chunk, EpisodeId
from ipvla.rollout.openpi.messages import (
    AHEAD,
    CHUNKING,
    CONTRACT,
    EXECUTE,
    RESET,
    SESSION,
    STEP,
    TOKEN_VARIABLE,
    ahead_message,
    pack,
    to_message,
    unpack,
)
from ipvla.types import Observation

#: The value of `server` in our own server's metadata.
OURS: Final = "ipvla"
_CONNECT_S = 10.0
#: Long enough for a model that compiles at its first observation.
_ANSWER_S = 300.0


class OpenpiError(ValueError):
    """The server cannot be reached, or does not answer as it should."""


@dataclass
class OpenpiClient:
    """The simulator worker's client for one episode, in place of a `PolicyClient`."""

    url: str
    token: str | None = field(default=None, repr=False)
    _connection: ClientConnection | None = field(default=None, init=False, repr=False)
    _ours: bool = field(default=False, init=False, repr=False)

    def act(self, episode_id: EpisodeId, observation: Observation, policy_step: int) -> Chunk | Answer:
        """Float32 [C, A]; of our own server the whole chunk, if something is `ahead`.

        OpenpiError if the server refuses, or does not answer within minutes.
        """
        if policy_step == 0:
            self._open()
        if self._connection is None:
            raise OpenpiError(f"{episode_id}: policy step {policy_step} of an episode that has no connection")
        message = to_message(observation)
        if not self._ours:
            del message[STEP]
        elif observation.ahead is not None:
            message[AHEAD] = ahead_message(observation.ahead)
        answer = _asked(self._connection, self.url, message)
        chunk, execute = self._chunk(answer), answer.get(EXECUTE) if self._ours else None
        return Answer(chunk, min(execute, len(chunk))) if isinstance(execute, int) and execute > 0 else chunk

    def ask(self, observation: Observation) -> Chunk:
        """Float32 [C, A], for an observation that nothing came before. OpenpiError as in `act`.

        Ours draws its noise from the observation's `episode` and `t`, as a policy of this project does. Of a
        server that is not ours nothing is known: it gets a connection for each question.
        """
        if self._connection is None or not self._ours:
            self._open()
        assert self._connection is not None, "it was just opened"
        message = to_message(observation)
        if self._ours:
            message |= {SESSION: observation.episode, RESET: True}
        else:
            del message[STEP]
        return self._chunk(_asked(self._connection, self.url, message))

    def end(self, episode_id: EpisodeId | None = None) -> None:
        """Closes the connection, which is the episode's."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> None:
        self.end()
        self._connection, metadata = _connected(self.url, self.token)
        self._ours = metadata.get("server") == OURS

    def _chunk(self, answer: Any) -> Chunk:
        actions = answer.get("actions") if isinstance(answer, dict) else None
        if not isinstance(actions, np.ndarray):
            raise OpenpiError(f"{self.url} answers {answer!r:.80}; expected a map with `actions` [C, A]")
        return actions.astype(np.float32)

    def __reduce__(self) -> tuple[type[Self], tuple[str, str | None]]:
        return type(self), (self.url, self.token)  # a connection is opened where it is used


@dataclass(frozen=True)
class OpenpiSource:
    """The source of a served policy, in place of a `PolicySource`.

    Attributes:
        url: `ws://host:port`.
        token: the server's `api_key`.
    """

    url: str
    token: str | None = field(default=None, repr=False)

    def metadata(self) -> dict[str, Any]:
        """The server's metadata. OpenpiError if it cannot be reached."""
        connection, metadata = _connected(self.url, self.token)
        connection.close()
        return metadata

    def require(self, pace: Pace, execute: int | None) -> None:
        """Asks our own server whether its policy can be played so; of other servers nobody knows.

        Args:
            execute: of the protocol, None for the policy's own.

        Raises:
            OpenpiError: the last chunk's rest would be sent to a server that does not go on from any.
            ValueError: its policy cannot be played so.
        """
        if pace.plain:
            return
        metadata = self.metadata()
        told = metadata.get(CHUNKING) if metadata.get("server") == OURS else None
        if isinstance(told, dict):
            head = HeadFacts(str(told.get("head")), int(told.get("steps", 0)), int(told.get("prefix", 0)))
            pace.require(int(told.get("chunk", 1)), execute or int(told.get(EXECUTE, 1)), head)
        elif pace.chunking.continues:
            raise OpenpiError(
                f"{self.url} does not go on from the last chunk's rest, as success.chunking.type "
                f"{pace.chunking.kind} wants it; choose switch or ensemble, or `ipvla serve` the policy"
            )

    def sha256(self) -> str:
        """The policy's, if the metadata hold it; else of the metadata and the address."""
        metadata = self.metadata()
        policy_hash = metadata.get("policy_sha256")
        if isinstance(policy_hash, str):
            return policy_hash
        return hashlib.sha256(self.url.encode() + pack(metadata)).hexdigest()

    def view(self, offered: Contract, world: str = "the world") -> Contract:
        """A server that is not ours speaks the protocol's language; ours states its own terms.

        One of ours of an earlier version states none: it acts in the units of the simulator, and is taken to have
        learned from pictures like the protocol's.

        Raises:
            ContractError: our server's policy does not fit the suite.
            OpenpiError: it cannot be reached.
            ValueError: what it states is no contract.
        """
        metadata = self.metadata()
        if metadata.get("server") != OURS:
            return offered.pictures_alone
        if CONTRACT not in metadata:
            return offered.in_environment_units.pictures_alone
        return fitted(Contract.from_dict(metadata[CONTRACT]), offered, f"the policy at {self.url}", world)

    def serve(self, serving: Serving, running: Service | None = None) -> ClientService:
        """The server runs elsewhere."""
        if running is not None:
            running.close()
        return ClientService(partial(OpenpiClient, self.url, self.token), serving.view(self))


def _connected(url: str, token: str | None) -> tuple[ClientConnection, dict[str, Any]]:
    headers = {"Authorization": f"Api-Key {token}"} if token else None
    try:
        connection = connect(
            url,
            additional_headers=headers,
            compression=None,
            max_size=None,
            open_timeout=_CONNECT_S,
            proxy=None,
        )
        metadata = unpack(connection.recv(timeout=_ANSWER_S, decode=False))
    except InvalidURI:
        raise OpenpiError(f"{url!r} is no address of an openpi server; give ws://HOST:PORT") from None
    except InvalidHandshake as error:
        raise OpenpiError(f"{url} does not let us in ({error}); does {TOKEN_VARIABLE} hold its key?") from None
    except (OSError, TimeoutError, WebSocketException) as error:
        raise OpenpiError(
            f"no openpi server answers at {url} ({error}); start it, or correct the address"
        ) from None
    if not isinstance(metadata, dict):
        raise OpenpiError(f"{url} begins with {metadata!r:.80}; an openpi server begins with its metadata")
    return connection, metadata


def _asked(connection: ClientConnection, url: str, message: dict[str, Any]) -> Any:
    try:
        connection.send(pack(message))
        answer = connection.recv(timeout=_ANSWER_S)
    except (OSError, TimeoutError, WebSocketException) as error:
        raise OpenpiError(f"{url} ended the connection or does not answer ({error})") from None
    if isinstance(answer, str):
        raise OpenpiError(f"{url} refuses the observation: {answer.strip().splitlines()[-1] if answer else ''}")
    return unpack(answer)
