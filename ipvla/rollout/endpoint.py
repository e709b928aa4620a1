"""What every kind of player has in common: a policy of this project, a scripted expert, a server somewhere else.

The kind of player decides once, in `view`, on which terms it plays: a policy of this project and an expert act in
the simulator's units, a server that is not ours speaks the language of the evaluation protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        resources: `ray.remote` options of a policy actor such as `{"num_gpus": 1}`; by default it asks for no
            resources, as it works only while simulators wait for it.
        replicas: actors with the same policy. An episode is pinned to one of them.
        capacity: episodes of a replica at a time; None for as many as come.
        lease_s: seconds after which an episode without a request is forgotten.
        max_batch: observations of a forward pass; None for as many as wait. The last bits of a matrix product
            depend on how many rows it has; with 1 an episode does not depend on the others.
    """

    offered: Contract | None = None
    world: str = "the world"
    threads: int = 1
    resources: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    capacity: int | None = None
    lease_s: float = 900.0
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if min(n for n in (self.replicas, self.capacity, self.max_batch) if n is not None) < 1:
            raise ValueError(
                f"{self.replicas} replicas with room for {self.capacity} episodes, {self.max_batch} in a batch, "
                "serve nothing; pass at least 1"
            )

    def view(self, player: PolicyEndpoint) -> Contract | None:
        """The terms on which `player` plays, None if none are offered. ContractError as in its `view`."""
        return None if self.offered is None else player.view(self.offered, self.world)


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


@dataclass
class ClientService:
    """The service of a player that needs no process of ours: there is nothing to start, replace or close."""

    client: Callable[[], Any]
    view: Contract | None = None

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class PolicyEndpoint(Protocol):
    """Who is evaluated: small, picklable, and started by `serve`."""

    def sha256(self) -> str:
        """One hash of everything that decides its actions."""

    def view(self, offered: Contract, world: str = "the world") -> Contract:
        """On which terms it plays where `offered` are the protocol's. ContractError if nothing converts them."""

    def serve(self, serving: Serving, running: Service | None = None) -> Service:
        """Starts it, in place of the player before it, whose service is closed if it is of another kind."""
