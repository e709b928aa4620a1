"""How an answer takes over from the last one: one choice by `chunking.type`.

- `switch`: the answer is played from its arrival on, whatever was planned before.
- `guided`: Real-Time Chunking (Black, Galliker, Levine 2025, arXiv 2506.07339). The last chunk's rest pulls at the
  flow that makes the answer: `ipvla.models.heads.guidance`. Any head with a velocity.
- `trained`: the actions that are played before the answer arrives are given to the head, which has learned to go
  on from them (Black, Ren, Equi, Levine 2025, arXiv 2512.05964): `model.head.prefix`.
- `ensemble`: temporal ensembling (Zhao et al. 2023, arXiv 2304.13705, section IV): the action of a step is the
  mean of what all answers say that reach it, the i-th oldest with weight exp(-decay i). Any head.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import draccus
import numpy as np
import numpy.typing as npt

from ipvla.types import Ahead

if TYPE_CHECKING:  # a simulator's process has no use for torch
    from ipvla.models.heads import HeadConfig

Chunk = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeadFacts:
    """What decides how a policy's answers can go on from one another, as a server tells it too.

    Attributes:
        head: its type.
        steps: in which its velocity is integrated; 0 for a head that has none.
        prefix: of how many given actions it has learned to go on from.
    """

    head: str
    steps: int
    prefix: int

    @classmethod
    def of(cls, head: HeadConfig) -> Self:
        """Of a policy's head."""
        steps = getattr(head, "steps", 0) if head.has_velocity else 0
        return cls(head.get_choice_name(type(head)), steps, head.longest_prefix)

    def require(self, ahead: Ahead) -> None:
        """ValueError in one line if the head cannot go on from what is ahead of an observation."""
        if ahead.guidance > 2 * self.steps:
            raise ValueError(
                f"ahead/guidance is {ahead.guidance:g}; a head of type {self.head} with {self.steps} steps takes "
                f"at most {2 * self.steps}"
            )
        if ahead.given and min(ahead.delay, len(ahead.actions)) > self.prefix:
            raise ValueError(
                f"ahead/delay is {ahead.delay}; a head of type {self.head} has learned to go on from "
                f"{self.prefix} given actions"
            )


class ChunkingConfig(draccus.ChoiceRegistry):
    """A choice by `type`; see the module's docstring.

    Attributes:
        overlaps: it has no effect where a chunk is over before the next one is asked for.
        continues: the answer depends on the last chunk's rest, which must therefore be played meanwhile.
        averages: older answers count as well.
    """

    overlaps: ClassVar[bool] = True
    continues: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """The name of the choice."""
        name: str = self.get_choice_name(type(self))
        return name

    def ahead(self, rest: Chunk, delay: int) -> Ahead:
        """What the policy is told, of the last chunk's rest [R, A] and control steps until it answers."""
        return Ahead(rest[:0], delay)

    def check(self, delay: int, head: HeadFacts) -> None:
        """ValueError in one line for a head that cannot answer so, after at most `delay` control steps."""

    def merged(self, actions: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """The action [A] of a step, from what each answer says that reaches it, the oldest first, at least one."""
        return actions[-1]

    def __str__(self) -> str:
        """As results record it; empty for `switch`."""
        return json.dumps({"type": self.kind, **asdict(self)})


@ChunkingConfig.register_subclass("switch")
@dataclass(frozen=True)
class SwitchConfig(ChunkingConfig):
    """The answer is played from its arrival on."""

    overlaps: ClassVar[bool] = False

    def __str__(self) -> str:
        return ""


@ChunkingConfig.register_subclass("guided")
@dataclass(frozen=True)
class GuidedConfig(ChunkingConfig):
    """See the module's docstring.

    Attributes:
        weight: what the guidance's weight is clipped to (beta, 5 in the paper); at most twice the head's `steps`,
            beyond which an Euler step overshoots.
    """

    continues: ClassVar[bool] = True

    weight: float = 5.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"success.chunking.weight is {self.weight}; it must be finite and above 0")

    def ahead(self, rest: Chunk, delay: int) -> Ahead:
        return Ahead(rest, delay, guidance=self.weight)

    def check(self, delay: int, head: HeadFacts) -> None:
        if not head.steps:
            raise ValueError(
                f"success.chunking.type guided pulls at a velocity, and a head of type {head.head} has none; "
                "choose ensemble or switch, or a policy with a flow head"
            )
        if self.weight > 2 * head.steps:
            raise ValueError(
                f"success.chunking.weight is {self.weight:g}, and the head takes {head.steps} steps: set it to at "
                f"most {2 * head.steps}, or sampling.steps higher"
            )


@ChunkingConfig.register_subclass("trained")
@dataclass(frozen=True)
class TrainedConfig(ChunkingConfig):
    """See the module's docstring."""

    continues: ClassVar[bool] = True

    def ahead(self, rest: Chunk, delay: int) -> Ahead:
        return Ahead(rest[:delay], delay, given=True)

    def check(self, delay: int, head: HeadFacts) -> None:
        if delay > head.prefix:
            raise ValueError(
                f"success.chunking.type trained: the head has learned to go on from {head.prefix} given "
                f"actions, and success.latency_steps is {delay}; train it with model.head.prefix {delay} or more "
                "(flow, layerwise), or choose guided"
            )


@ChunkingConfig.register_subclass("ensemble")
@dataclass(frozen=True)
class EnsembleConfig(ChunkingConfig):
    """See the module's docstring.

    Attributes:
        decay: m, 0.01 in the paper's program; the larger, the more the oldest answer counts.
    """

    averages: ClassVar[bool] = True

    decay: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ValueError(f"success.chunking.decay is {self.decay}; it must be finite and at least 0")

    def merged(self, actions: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        if len(actions) == 1:
            return actions[0]
        weights = np.exp(-self.decay * np.arange(len(actions)))
        mean: npt.NDArray[np.float32] = (weights @ np.stack(actions) / weights.sum()).astype(np.float32)
        return mean
