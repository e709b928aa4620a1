"""The memory protocol: a value goes in with the observation, another comes out with enriched features.

Most mechanisms enrich what the backbone has made of an observation: they implement `step`. Those that feed the
backbone itself (`latent`, `kv`, `prompt`) take part in its pass: they implement `observe` and `window`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import draccus
import torch
from torch import nn

from ipvla.models.backbones import Backbone, BackboneOutput, Context
from ipvla.models.features import Features, stacked
from ipvla.types import Memory, ModelInputs, StepBatch


def silence(*layers: nn.Linear) -> None:
    """From now on these give 0, and learn from there."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def select(condition: torch.Tensor, yes: Memory, no: Memory) -> Memory:
    """Row by row: `yes` where `condition` bool [B] is True, else `no`."""
    return {
        name: torch.where(condition.reshape(-1, *[1] * (value.ndim - 1)), value, no[name])
        for name, value in yes.items()
    }


@dataclass(frozen=True)
class MemoryConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the mechanisms of this folder."""

    @property
    def feeds_backbone(self) -> bool:
        """Whether the backbone's pass depends on it."""
        return False

    @property
    def shards(self) -> bool:
        """Whether it trains where each worker has a part of the weights."""
        return True

    @property
    def longest_plan(self) -> int:
        """Tokens of the plan that it puts in the prompt, 0 for none; training then needs plans."""
        return 0

    def check(self) -> None:
        """ValueError for what cannot be built with any backbone."""

    def build(self, backbone: Backbone) -> MemoryModule:
        """The mechanism for features of this backbone's sizes; it holds no reference to the backbone."""
        raise NotImplementedError


class MemoryModule(nn.Module):
    """One information-preserving mechanism. Its weights are learned; what it remembers is never an attribute.

    Attributes:
        feeds_backbone: `step` cannot stand alone, since the backbone's pass itself depends on the memory.
        plan_tokens: Lp, tokens of the text plan that training batches must carry; 0 for none.
    """

    feeds_backbone: bool = False
    plan_tokens: int = 0

    def initial(self, batch: int) -> Memory:
        """The memory of an episode that has not begun: named tensors [batch, ...] of a fixed size."""
        raise NotImplementedError

    def seen_through(self, backbone: Backbone) -> Backbone:
        """What has the sizes of the features that it gives: the backbone, but for a model at two speeds."""
        return backbone

    def close(self) -> bool:
        """Makes it add nothing to the features until it is trained, so that a policy that acts well goes on so.

        False if the mechanism cannot: its weights are as they were drawn.
        """
        return False

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        """One policy step of features [B, ...] at control step t int64 [B]: (enriched features, next memory)."""
        raise NotImplementedError

    def at_once(self, backbone: Backbone, inputs: ModelInputs, features: Features) -> Features:
        """Features [B, ...] of an episode's first step, as this enriches what the backbone has made of them."""
        if self.feeds_backbone:
            return features
        t = torch.zeros(len(features.cognition), dtype=torch.long, device=features.cognition.device)
        initial = {name: value.to(t.device) for name, value in self.initial(len(t)).items()}
        return self.step(features, initial, t)[0]

    def scan(
        self, features: Features, memory: Memory, t: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor
    ) -> tuple[Features, Memory]:
        """A training window [B, K, ...]: reset where `is_first`, unchanged where not `valid`."""
        return self._loop(self.step, features, memory, t, is_first, valid)

    def observe(
        self, backbone: Backbone, inputs: ModelInputs, memory: Memory, t: torch.Tensor
    ) -> tuple[Features, Memory]:
        """One policy step from inputs [B, ...], the backbone's pass included."""
        return self.step(backbone(inputs).features, memory, t)

    def window(
        self, backbone: Backbone, batch: StepBatch, memory: Memory
    ) -> tuple[Features, Memory, torch.Tensor | None]:
        """One training window: features [B, K, ...], the memory after it, and the mechanism's own loss, if any."""
        features = backbone(batch.inputs.flatten()).features
        if backbone.insulated:
            features = features.map(torch.Tensor.detach)
        features = features.map(lambda x: x.reshape(*batch.is_first.shape, *x.shape[1:]))
        features, memory = self.scan(features, memory, batch.t, batch.is_first, batch.valid)
        return features, memory, None

    def _loop(
        self,
        step: Callable[[Features, Memory, torch.Tensor], tuple[Features, Memory]],
        features: Features,
        memory: Memory,
        t: torch.Tensor,
        is_first: torch.Tensor,
        valid: torch.Tensor,
    ) -> tuple[Features, Memory]:
        """`scan` with one `step` after another."""
        fresh, cognition = self._fresh(is_first), []
        for k in range(is_first.shape[1]):
            enriched, after = step(features.at(k), select(is_first[:, k], fresh, memory), t[:, k])
            memory = select(valid[:, k], after, memory)
            cognition.append(enriched.cognition)
        return features.with_cognition(torch.stack(cognition, 1)), memory

    def _fresh(self, is_first: torch.Tensor) -> Memory:
        return {name: value.to(is_first.device) for name, value in self.initial(is_first.shape[0]).items()}


@MemoryConfig.register_subclass("none")
@dataclass(frozen=True)
class NoMemoryConfig(MemoryConfig):
    """No memory: every step is decided from the current observation alone, as in OpenVLA. Has no settings."""

    def build(self, backbone: Backbone) -> NoMemory:
        return NoMemory()


class NoMemory(MemoryModule):
    """The empty value in, the empty value out; features pass through bit for bit."""

    def initial(self, batch: int) -> Memory:
        return {}

    def close(self) -> bool:
        return True

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        return features, memory

    def scan(
        self, features: Features, memory: Memory, t: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor
    ) -> tuple[Features, Memory]:
        return features, memory


@dataclass(frozen=True)
class Segments:
    """A window's steps, numbered by episode, so that a mechanism can read them all at once.

    Attributes:
        step: int64 [B, K], policy steps of the episode before this one.
        episode: int64 [B, K], 0 for the episode that the memory came with, one more at each start; -1 on an
            idle step that claims a start, which sees nothing and leaves no trace.
        after: int64 [B], policy steps of the last episode when the window is over.
    """

    step: torch.Tensor
    episode: torch.Tensor
    after: torch.Tensor

    @classmethod
    def of(cls, count: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor) -> Self:
        """From count int64 [B], the policy steps before the window, and is_first, valid bool [B, K]."""
        starts = is_first & valid
        episode = starts.cumsum(1)
        through = valid.cumsum(1)
        before = through - valid.long()
        origin = torch.where(starts, before, 0).cummax(1).values
        origin = torch.where(episode == 0, -count[:, None], origin)
        return cls(
            step=torch.where(is_first, 0, before - origin),
            episode=torch.where(is_first & ~valid, -1, episode),
            after=through[:, -1] - origin[:, -1],
        )


class BackboneMemory(MemoryModule):
    """A mechanism that puts something before the language layers and keeps something of what they make of it."""

    feeds_backbone = True

    def context(self, memory: Memory, t: torch.Tensor) -> Context:
        """What the backbone reads at control step t int64 [B] beside the observation."""
        raise NotImplementedError

    def update(self, output: BackboneOutput, memory: Memory, t: torch.Tensor) -> Memory:
        """The memory after the backbone's pass."""
        raise NotImplementedError

    def observe(
        self, backbone: Backbone, inputs: ModelInputs, memory: Memory, t: torch.Tensor
    ) -> tuple[Features, Memory]:
        output = backbone(inputs, self.context(memory, t))
        return output.features, self.update(output, memory, t)

    def window(
        self, backbone: Backbone, batch: StepBatch, memory: Memory
    ) -> tuple[Features, Memory, torch.Tensor | None]:
        shape = batch.is_first.shape
        embedded = backbone.embed(batch.inputs.flatten()).map(lambda x: x.reshape(*shape, *x.shape[1:]))
        fresh, seen = self._fresh(batch.is_first), list[Features]()
        for k in range(shape[1]):
            now, t = embedded.at(k), batch.t[:, k]
            before = select(batch.is_first[:, k], fresh, memory)
            output = backbone.encode(now, self.context(before, t))
            memory = select(batch.valid[:, k], self.update(output, before, t), memory)
            seen.append(output.features)
        cognition, layers = torch.stack([x.cognition for x in seen], 1), stacked([x.layers for x in seen])
        return Features(cognition, embedded.perception, embedded.proprio, layers), memory, None
