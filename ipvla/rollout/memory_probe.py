"""Causal probes of a memory: the same episode, with what the policy remembers changed at control step t.

At an episode's first policy step at or after t, just before the policy acts on its memory m,

- `reset`: m becomes the memory of an episode that has not begun;
- `swap`: m becomes the memory that another episode had at that point, which `record` has written to a file;
- `shuffle`: the values of each floating-point tensor of m change places at random;
- `freeze`: m stays as it is, at this step and at all later ones: it is read, and what is written is dropped.

The memory is a value that goes in and comes out, so a probe stands around any policy, mechanisms know nothing of
it, and what an episode keeps has the same tensors as ever. Policy steps are `execute` control steps apart: the
first one at or after t is the one in [t, t + execute), and nothing needs to remember that it has been. Which probe
an episode is subject to comes with its observations, so that one policy actor serves them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from ipvla.files import replacing
from ipvla.rollout.episode import Chunk
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.rollout.policy_client import PolicyClient
from ipvla.rollout.policy_server import Policy
from ipvla.types import Memory, Observation


@dataclass(frozen=True)
class Probe:
    """What happens to one episode's memory at control step t.

    Attributes:
        kind: its name in results.
        freezes: what the policy writes from t on is dropped.
    """

    kind: ClassVar[str]
    freezes: ClassVar[bool] = False
    t: int

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        """The memory [1, ...] in place of `memory` [1, ...] of `episode` (an `EpisodeSpec.key`).

        `initial` [1, ...] is the memory of an episode that has not begun.
        """
        raise NotImplementedError

    def of(self, episode: str) -> Self:
        """The part of the probe that concerns this episode."""
        return self


@dataclass(frozen=True)
class Reset(Probe):
    """See the module's docstring."""

    kind: ClassVar[str] = "reset"

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        return initial


@dataclass(frozen=True)
class Freeze(Probe):
    """See the module's docstring."""

    kind: ClassVar[str] = "freeze"
    freezes: ClassVar[bool] = True

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        return memory


@dataclass(frozen=True)
class Record(Probe):
    """Changes nothing, and writes the memory to `memory_file`, whole or not at all.

    Attributes:
        directory: the policy's actor can write there.
    """

    kind: ClassVar[str] = "record"
    directory: Path

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        with replacing(memory_file(self.directory, episode, self.t)) as part:
            save_file({name: value.cpu().clone() for name, value in memory.items()}, part)
        return memory


def memory_file(directory: Path, episode: str, t: int) -> Path:
    """Where `Record` puts what `episode` remembered at its first policy step at or after t."""
    return directory / episode / f"{t}.safetensors"


@dataclass(frozen=True)
class Swap(Probe):
    """See the module's docstring.

    Attributes:
        donors: episode -> file of the memory that it gets; an episode without one keeps its own.
    """

    kind: ClassVar[str] = "swap"
    donors: Mapping[str, Path] = field(default_factory=dict)

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        return load_file(self.donors[episode]) if episode in self.donors else memory

    def of(self, episode: str) -> Self:
        return replace(self, donors={key: path for key, path in self.donors.items() if key == episode})


@dataclass(frozen=True)
class Shuffle(Probe):
    """See the module's docstring. Counters, times, flags and token ids stay: permuted, they would mean nothing.

    The permutation is drawn from a hash of the episode and the tensor's name.
    """

    kind: ClassVar[str] = "shuffle"

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        return {
            name: _permuted(value, f"{episode}/{name}") if value.is_floating_point() else value
            for name, value in memory.items()
        }


#: Name -> the probe at t; `swap` gets its donors besides.
PROBES: Mapping[str, Callable[[int], Probe]] = {probe.kind: probe for probe in (Reset, Freeze, Swap, Shuffle)}


def can_shuffle(policy: Policy) -> bool:
    """Has the policy's memory any floating-point tensor?"""
    return any(value.is_floating_point() for value in policy.initial_memory(1).values())


@dataclass(frozen=True)
class ProbedObservation(Observation):
    """An observation that says whose it is (its `EpisodeSpec.key`) and what happens to that episode's memory."""

    episode: str
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class ProbedPolicy:
    """`policy`, with memories changed as the observations ask; rows of a batch may be at any step of any probe."""

    policy: Policy

    @property
    def execute(self) -> int:
        return self.policy.execute

    def initial_memory(self, batch: int) -> Memory:
        return self.policy.initial_memory(batch)

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        """As the policy's own; an observation that asks for nothing is answered by the policy as it is."""
        memory = self._changed(observations, memory)
        actions, after = self.policy.act(observations, memory)
        frozen = torch.tensor([_is_frozen(observation) for observation in observations])
        if frozen.any():
            after = {name: _where(frozen, memory[name], value) for name, value in after.items()}
        return actions, after

    def _changed(self, observations: Sequence[Observation], memory: Memory) -> Memory:
        due = [
            (i, observation.episode, probe)
            for i, observation in enumerate(observations)
            if isinstance(observation, ProbedObservation)
            for probe in observation.probes
            if probe.t <= observation.t < probe.t + self.execute
        ]
        if not due:
            return memory
        initial = self.policy.initial_memory(1)
        changed = {name: value.clone() for name, value in memory.items()}
        for i, episode, probe in due:
            row = {name: value[i : i + 1] for name, value in changed.items()}
            for name, value in probe.change(row, initial, episode).items():
                row[name].copy_(value)
        return changed


@dataclass(frozen=True)
class ProbedSource(PolicySource):
    """Opens the policy of `directory` so that it can be probed.

    Attributes:
        probes: what is asked of the policy now; the policy that is opened is the same for all.
    """

    probes: tuple[Probe, ...] = field(default=(), compare=False)

    def open(self) -> Policy:
        return ProbedPolicy(self.load(self.directory))


@dataclass
class ProbingClient(PolicyClient):
    """What a simulator worker holds: it sends the probes along with each observation."""

    probes: tuple[Probe, ...]

    def act(self, episode_id: str, observation: Observation, policy_step: int) -> Chunk:
        episode, _, _ = episode_id.rpartition("#")  # the attempt
        probes = tuple(probe.of(episode) for probe in self.probes)
        probed = ProbedObservation(**vars(observation), episode=episode, probes=probes)
        return super().act(episode_id, probed, policy_step)


class ProbingService(PolicyService):
    """The actor of a `ProbedSource`; episodes that begin from now on are subject to `probes`."""

    probes: tuple[Probe, ...] = ()

    def client(self) -> PolicyClient:
        return ProbingClient(super().client().actor, self.probes)


def _is_frozen(observation: Observation) -> bool:
    return isinstance(observation, ProbedObservation) and any(
        probe.freezes and observation.t >= probe.t for probe in observation.probes
    )


def _permuted(value: torch.Tensor, seed: str) -> torch.Tensor:
    drawn = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(drawn))
    return value.flatten()[order.to(value.device)].view_as(value)


def _where(rows: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(rows.to(no.device).reshape(-1, *[1] * (no.ndim - 1)), yes, no)
