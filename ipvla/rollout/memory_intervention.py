"""Interventions on a memory: the same episode, with the policy's memory changed at control step t.

At an episode's first policy step at or after t, just before the policy acts on its memory m,

- `reset`: m becomes the memory of an episode that has not begun;
- `swap`: m becomes the memory that another episode had at that point, which `record` has written to a file;
- `shuffle`: the values of each floating-point tensor of m change places at random;
- `freeze`: m stays as it is, at this step and at all later ones: the policy reads m, and its writes are dropped.

The memory is a value that goes in and comes out, so an intervention wraps any policy: mechanisms do not know of
it, and an episode's memory has the same tensors as without it. Policy steps are `execute` control steps apart: the
first one at or after t is the one in [t, t + execute), so no state says whether it has passed. An observation
names the interventions on its episode, so that one policy actor serves all of them.
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
from ipvla.models.speeds.two_speeds import part_of
from ipvla.rollout.episode import Answer, Chunk, EpisodeId
from ipvla.rollout.policy_actor import PolicyClient, PolicyService, PolicySource
from ipvla.rollout.policy_server import BatchPolicy
from ipvla.types import THOUGHT_T, Memory, Observation


@dataclass(frozen=True)
class MemoryIntervention:
    """What happens to one episode's memory at control step t.

    Attributes:
        kind: its name in results.
        freezes: what the policy writes from t on is dropped.
        part: of a policy at two speeds, the part, "slow" or "fast", whose memory is changed; None for all of it.
            The slow part's last thought is of its memory.
    """

    kind: ClassVar[str]
    freezes: ClassVar[bool] = False
    t: int
    part: str | None = field(default=None, kw_only=True)

    def concerns(self, name: str) -> bool:
        """Is this entry of the memory changed?"""
        return self.part is None or part_of(name) == self.part

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        """The memory [1, ...] in place of `memory` [1, ...] of `episode` (an `EpisodeSpec.key`).

        `initial` [1, ...] is the memory of an episode that has not begun.
        """
        raise NotImplementedError

    def of(self, episode: str) -> Self:
        """The part of the intervention that concerns this episode."""
        return self


@dataclass(frozen=True)
class Reset(MemoryIntervention):
    """See the module's docstring."""

    kind: ClassVar[str] = "reset"

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        return initial


@dataclass(frozen=True)
class Freeze(MemoryIntervention):
    """See the module's docstring."""

    kind: ClassVar[str] = "freeze"
    freezes: ClassVar[bool] = True

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        return memory


@dataclass(frozen=True)
class RecordMemory(MemoryIntervention):
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
    """Where `RecordMemory` puts what `episode` remembered at its first policy step at or after t."""
    return directory / episode / f"{t}.safetensors"


@dataclass(frozen=True)
class Swap(MemoryIntervention):
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
class Shuffle(MemoryIntervention):
    """See the module's docstring. Counters, times, flags and token ids stay: permuted, they would mean nothing.

    The permutation is drawn from a hash of the episode and the tensor's name.
    """

    kind: ClassVar[str] = "shuffle"

    def change(self, memory: Memory, initial: Memory, episode: str) -> Memory:
        return {
            name: _permuted(value, f"{episode}/{name}") if value.is_floating_point() else value
            for name, value in memory.items()
        }


#: Name -> the intervention at t; `swap` also needs its donors.
INTERVENTIONS: Mapping[str, Callable[[int], MemoryIntervention]] = {
    intervention.kind: intervention for intervention in (Reset, Freeze, Swap, Shuffle)
}


def can_shuffle(policy: BatchPolicy, part: str | None = None) -> bool:
    """Has the policy's memory, or this part of it, any floating-point tensor?"""
    shuffle = Shuffle(0, part=part)
    return any(v.is_floating_point() for name, v in policy.initial_memory(1).items() if shuffle.concerns(name))


def has_part(policy: BatchPolicy, part: str) -> bool:
    """Is the policy at two speeds, and is anything remembered in this part of it?"""
    memory = policy.initial_memory(1)
    return THOUGHT_T in memory and any(part_of(name) == part for name in memory)


@dataclass(frozen=True)
class IntervenedObservation(Observation):
    """An observation with the interventions on the memory of its episode, an `EpisodeSpec.key`."""

    interventions: tuple[MemoryIntervention, ...] = ()


@dataclass(frozen=True)
class IntervenedPolicy:
    """`policy`, with memories changed as the observations ask.

    Rows of a batch may be at different steps and have different interventions.
    """

    policy: BatchPolicy

    @property
    def execute(self) -> int:
        return self.policy.execute

    def initial_memory(self, batch: int) -> Memory:
        return self.policy.initial_memory(batch)

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        """As the policy's own; an observation without interventions gets the policy's unchanged answer."""
        memory = self._changed(observations, memory)
        actions, after = self.policy.act(observations, memory)
        frozen = {name: torch.tensor([_is_frozen(one, name) for one in observations]) for name in after}
        if any(rows.any() for rows in frozen.values()):
            after = {name: _where(frozen[name], memory[name], value) for name, value in after.items()}
        return actions, after

    def _changed(self, observations: Sequence[Observation], memory: Memory) -> Memory:
        due = [
            (i, observation.episode, intervention)
            for i, observation in enumerate(observations)
            if isinstance(observation, IntervenedObservation)
            for intervention in observation.interventions
            if intervention.t <= observation.t < intervention.t + self.execute
        ]
        if not due:
            return memory
        initial = self.policy.initial_memory(1)
        changed = {name: value.clone() for name, value in memory.items()}
        for i, episode, intervention in due:
            row = {name: value[i : i + 1] for name, value in changed.items()}
            for name, value in intervention.change(row, initial, episode).items():
                if intervention.concerns(name):
                    row[name].copy_(value)
        return changed


@dataclass(frozen=True)
class InterventionSource(PolicySource):
    """Opens the policy of `directory` in an `IntervenedPolicy`.

    Attributes:
        interventions: on the episodes that begin now; the policy is the same for all of them.
    """

    interventions: tuple[MemoryIntervention, ...] = field(default=(), compare=False)

    def open(self) -> BatchPolicy:
        return IntervenedPolicy(self.load(self.directory))


@dataclass
class InterventionClient(PolicyClient):
    """Sends the interventions with each observation."""

    interventions: tuple[MemoryIntervention, ...]

    def act(self, episode_id: EpisodeId, observation: Observation, policy_step: int) -> Chunk | Answer:
        return super().act(episode_id, self.intervened(episode_id.episode, observation), policy_step)

    def intervened(self, episode: str, observation: Observation) -> IntervenedObservation:
        """The observation with the interventions on this episode (an `EpisodeSpec.key`)."""
        concerned = tuple(intervention.of(episode) for intervention in self.interventions)
        return IntervenedObservation(**{**vars(observation), "episode": episode}, interventions=concerned)


class InterventionService(PolicyService):
    """The actor of an `InterventionSource`; `interventions` change the episodes that begin from now on."""

    interventions: tuple[MemoryIntervention, ...] = ()

    def client(self) -> PolicyClient:
        return InterventionClient(super().client().actor, self.interventions)


def _is_frozen(observation: Observation, name: str) -> bool:
    return isinstance(observation, IntervenedObservation) and any(
        intervention.freezes and intervention.concerns(name) and observation.t >= intervention.t
        for intervention in observation.interventions
    )


def _permuted(value: torch.Tensor, seed: str) -> torch.Tensor:
    drawn = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(drawn))
    return value.flatten()[order.to(value.device)].view_as(value)


def _where(rows: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(rows.to(no.device).reshape(-1, *[1] * (no.ndim - 1)), yes, no)
