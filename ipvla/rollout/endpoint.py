"""What every kind of player has in common: a policy of this project, a scripted expert, a server somewhere else.

The kind of player decides once, in `view`, on which terms it plays: a policy of this project and an expert act in
the simulator's units, a server that is not ours speaks the language of the evaluation protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ipvla.contract import Contract


@dataclass(frozen=True)
class Serving:
    """How a player is run, and on what terms it is asked.

    Attributes:
        offered: the terms of the protocol in the suite; None compares nothing.
        world: the suite and the protocol, in messages.
        threads: CPU threads of a forward pass.
        resources: what a policy actor asks Ray for.
        replicas: actors with the same policy.
        capacity: episodes of a replica at a time; None for as many as come.
        lease_s: seconds after which an episode that is not heard of is forgotten.
        max_batch: observations of a forward pass; None for as many as wait.
    """

    offered: Contract | None = None
    world: str = "the world"
    threads: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    replicas: int = 1
    capacity: int | None = None
    lease_s: float = 900.0
    max_batch: int | None = None


class Service(Protocol):
    """A player that answers.

    Attributes:
        view: the terms on which it plays; None for the protocol's pictures and actions in the simulator's units.
    """

    view: Contract | None

    def client(self) -> Any:
        """What a simulator's process holds for one episode, picklable."""

    def stats(self) -> dict[str, float]:
        """What is known of its load; empty for what runs elsewhere."""

    def close(self) -> None: ...


class PolicyEndpoint(Protocol):
    """Who is evaluated: small, picklable, and started by `serve`."""

    def sha256(self) -> str:
        """One hash of everything that decides its actions."""

    def view(self, offered: Contract, world: str = "the world") -> Contract:
        """On which terms it plays where `offered` are the protocol's. ContractError if nothing converts them."""

    def serve(self, serving: Serving, running: Service | None = None) -> Service:
        """Starts it, in place of the player before it, whose service is closed if it is of another kind."""
