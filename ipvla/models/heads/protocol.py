"""The Head protocol: from memory-augmented features to a chunk of actions; and what heads share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import draccus
import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features, Reads
from ipvla.models.heads.integrators import require_integrator


class Head(nn.Module):
    """`weight` bool [B, C, A] is True where an action exists and its dimension varies in the dataset.

    A head draws nothing at random itself: what it needs comes in as `noise`, float32 [B, *shape], standard normal,
    each row drawn from its episode and control step. So a chunk does not depend on what else is in the batch.

    Attributes:
        noise_shape: of one row of what `sample` takes; None for a head that takes none.
        loss_noise_shape: of one row of what `loss` takes. In training another row is drawn in every epoch.
        action_varies: bool [A], False where the dataset is constant; None for a head alone, whose dimensions all
            vary. What `sample` gives in the others is not used.
        terms: parts of the latest `loss` for the log, detached.
    """

    noise_shape: tuple[int, ...] | None = None
    loss_noise_shape: tuple[int, ...] | None = None
    action_varies: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("action_varies", None, persistent=False)
        self.terms: dict[str, torch.Tensor] = {}

    def set_varies(self, action_varies: torch.Tensor) -> None:
        """Sets `action_varies`, where the model is built. ValueError for more of them than the head takes."""
        self.action_varies = action_varies.clone()

    def save_description(self, directory: Path) -> None:
        """Writes files that a policy needs beside its weights into its directory; most heads have none."""

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scalar loss of normalised actions [B, C, A], averaged over `weight`."""
        raise NotImplementedError

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised actions float32 [B, C, A]."""
        raise NotImplementedError

    def resume(self, features: Features, noise: torch.Tensor | None, rest: Rest) -> torch.Tensor:
        """As `sample`, going on from what is left of the last chunk; a row with no rest as `sample` has it.

        ValueError for a head that cannot.
        """
        raise ValueError(
            f"{type(self).__name__} makes a chunk without a velocity: nothing can pull at it; choose "
            "success.chunking.type ensemble or switch"
        )

    def expected(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """What a probe compares, float32 [B, C, A], differentiable: `sample`, or a mean where that chooses."""
        return self.sample(features, noise)

    def learn_from(self, teacher: Head) -> None:
        """Where training starts from a policy: that policy's head, whose weights this one has taken over."""


@dataclass(frozen=True)
class Rest:
    """What is left of last chunks, for a batch of new ones; see `ipvla.types.Ahead`.

    Attributes:
        actions: float32 [B, C, A], normalised, from each new chunk's first control step on; 0 past their end.
        left: int64 [B], R, how many are left.
        frozen: int64 [B], how many are played before the new chunk is there, at most R.
        guidance: float32 [B], the largest weight of what pulls a chunk towards `actions`; 0 for none.
        given: int64 [B], how many are the chunk's own first actions, at most `frozen`.
    """

    actions: torch.Tensor
    left: torch.Tensor
    frozen: torch.Tensor
    guidance: torch.Tensor
    given: torch.Tensor


@dataclass(frozen=True)
class Sampling:
    """How a policy that integrates a velocity field does so in rollout; what is None stays as it was trained.

    Attributes:
        steps: integration steps, at least 1.
        integrator: one of `ipvla.models.heads.integrators`.
    """

    steps: int | None = None
    integrator: str | None = None

    def __post_init__(self) -> None:
        steps = 1 if self.steps is None else self.steps
        require_integrator(steps, self.integrator or "euler", "sampling")

    def __str__(self) -> str:
        """What a result says of it; empty if nothing is set."""
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class HeadConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the heads of this folder."""

    @property
    def bounded(self) -> bool:
        """Does it give actions in [-1, 1] only?"""
        return False

    @property
    def reads(self) -> Reads:
        """The language layers of which the head finds states in `Features.layers`."""
        return Reads()

    @property
    def has_velocity(self) -> bool:
        """Does it integrate a velocity, at which a chunk's rest can pull?"""
        return False

    @property
    def longest_prefix(self) -> int:
        """Of how many given actions it has learned to go on from."""
        return 0

    def check(self, chunk: int) -> None:
        """ValueError in one line for what can be known to be wrong before anything is built."""

    def beside(self, directory: Path) -> HeadConfig:
        """The same with the files that `Head.save_description` wrote into a policy's directory."""
        return self

    @property
    def distils(self) -> bool:
        """Does it learn from another policy's head alone? Then nothing else of the model is trained."""
        return False

    @property
    def insulates(self) -> bool:
        """Does its loss send no gradient into the backbone?"""
        return False

    def sampled(self, sampling: Sampling) -> Self:
        """The same, with these settings of rollout. ValueError for a head that integrates nothing."""
        if not str(sampling):
            return self
        raise ValueError(
            f"sampling: {sampling}, and a head of type {self.get_choice_name(type(self))} takes no such steps; "
            "leave it out, or choose a policy with a flow head"
        )

    def describe(self) -> dict[str, str]:
        """What a result says of how actions are made, beside the type."""
        return {}

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> Head:
        """A head for features of this backbone's sizes and `proprio` dimensions; it keeps no backbone."""
        raise NotImplementedError


@dataclass(frozen=True)
class GlimpseHeadConfig(HeadConfig):
    """Of a head that reads a `Glimpse`.

    Attributes:
        hidden: the head's width.
        queries: places among the visual tokens that one glimpse looks at.
    """

    hidden: int = 256
    queries: int = 6

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.queries < 1:
            raise ValueError(f"head.hidden {self.hidden} and head.queries {self.queries} must be at least 1")


class Glimpse(nn.Module):
    """What the (memory-augmented) cognition asks for, looked up among the visual tokens.

    Features -> one vector [B, H] that holds cognition, what was looked at, and the proprioception. Single-head
    cross-attention per query: softmax(W_q c . W_k v / sqrt(k)) v over the visual tokens, whose raw values
    (coordinates included) are read out, so a query can return a place.
    """

    def __init__(self, config: GlimpseHeadConfig, backbone: Backbone, proprio: int, key: int = 64) -> None:
        super().__init__()
        hidden, queries, perception = config.hidden, config.queries, backbone.perception_size
        self.queries = queries
        self.key_size = key
        self.ask = nn.Sequential(nn.LayerNorm(backbone.width), nn.Linear(backbone.width, hidden), nn.GELU())
        self.query = nn.Linear(hidden, queries * key)
        self.key = nn.Linear(perception, key)
        with torch.no_grad():
            self.key.weight *= 4  # sharp enough from the start to pick single cells
        self.out = nn.Sequential(nn.Linear(queries * perception + hidden + proprio, hidden), nn.GELU())

    def forward(self, features: Features) -> torch.Tensor:
        asked = self.ask(features.cognition)
        query = self.query(asked).unflatten(-1, (self.queries, self.key_size))
        score = query @ self.key(features.perception).transpose(1, 2) * self.key_size**-0.5
        glimpsed = score.float().softmax(-1).to(features.perception.dtype) @ features.perception
        out: torch.Tensor = self.out(torch.cat([glimpsed.flatten(1), asked, features.proprio.to(asked.dtype)], -1))
        return out


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 [B, *shape], each row drawn from its seed in [0, 2^63) alone; on the CPU.

    A generator for each row: what one draws for many rows, or on another device, may differ in the last bit.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, *shape)


def masked_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `weight` is True; 0 where nothing is, so that an idle window has no gradient."""
    return (values * weight).sum() / weight.sum().clamp(min=1)
