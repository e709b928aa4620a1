"""A slow part that thinks now and then, and a fast part that acts at every call on the last thought.

    thought, m_slow = slow(observation, m_slow)              at the calls that are due
    features, m_fast = fast(observation, thought, age, m_fast)   at every call

All of it is the episode's row of the memory: both mechanisms' states, the thought, the control step `held/t` of
the observation that it rests on, and the one from which the next thought is `due`. So a batch's rows that are due
go through the slow part together, and all rows through the fast part together; an episode that another process
goes on with is refused as ever, and a probe of the memory may change either part.

Training draws, at each thought, after how many control steps the next one is due: uniform from 1 to the staleness
limit. So every age that rollout can meet is met, and a mechanism in the slow part steps as unevenly as it will.
Helix (Figure, 2025) trains with the deployed offset alone, and then knows no other.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory import MemoryConfig, MemoryModule, NoMemoryConfig
from ipvla.models.memory.protocol import select
from ipvla.models.speeds.protocol import TwoSpeedsConfig
from ipvla.types import Memory, ModelInputs, StepBatch

#: Angular frequencies of an age's sines and cosines, in half turns per staleness limit.
_FREQUENCIES = (1, 2, 4, 8)


class FastPart(Backbone):
    """What answers every call, from the present observation, the slow part's last thought and its age.

    It stands where a backbone stands for memory and head behind it, which are built on its `width` and
    `perception_size`; it has no language layers of its own.
    """

    num_layers = 0
    vocabulary = 0

    def blank(self, batch: int) -> Memory:
        """The thought of episodes that have not begun: named tensors [batch, ...] of a fixed size."""
        raise NotImplementedError

    def thought(self, features: Features) -> Memory:
        """What is kept of the slow part's features [..., ], memory included, as `blank` has it."""
        raise NotImplementedError

    def look(self, slow: Backbone, inputs: ModelInputs, thought: Memory, age: torch.Tensor) -> Features:
        """Features [B, ...] of inputs [B, ...].

        Args:
            slow: the backbone that the thought is of.
            thought: [B, ...].
            age: int64 [B], control steps since the thought's observation.
        """
        raise NotImplementedError

    def thinking_loss(self, features: Features, batch: StepBatch, due: torch.Tensor) -> torch.Tensor | None:
        """What the slow part is trained on besides, from its features [B, K, ...] where `due` bool [B, K]."""
        return None


class Age(nn.Module):
    """An age int64 [B] in control steps as float [B, D]: linear in its share of the limit, sines and cosines."""

    def __init__(self, staleness: int, width: int) -> None:
        super().__init__()
        self.staleness = staleness
        self.out = nn.Linear(1 + 2 * len(_FREQUENCIES), width)

    def forward(self, age: torch.Tensor) -> torch.Tensor:
        share = (age.float() / self.staleness)[:, None]
        turns = share * math.pi * torch.tensor(_FREQUENCIES, device=age.device)
        out: torch.Tensor = self.out(torch.cat([share, turns.sin(), turns.cos()], -1))
        return out


class TwoSpeeds(MemoryModule):
    """See the module's docstring.

    Args:
        slow: the mechanism behind the backbone.
        after: the mechanism behind the fast part.
    """

    feeds_backbone = True

    def __init__(self, config: TwoSpeedsConfig, slow: MemoryModule, fast: FastPart, after: MemoryModule) -> None:
        super().__init__()
        self.config, self.slow, self.fast, self.after = config, slow, fast, after

    @classmethod
    def around(cls, fast: FastPart, config: TwoSpeedsConfig, memory: MemoryConfig, backbone: Backbone) -> Self:
        """The mechanism `memory` stands where `config.memory` puts it."""
        none = NoMemoryConfig()
        slow, after = (none if config.memory == other else memory for other in ("fast", "slow"))
        return cls(config, slow.build(backbone), fast, after.build(fast))

    def seen_through(self, backbone: Backbone) -> Backbone:
        return self.fast

    def initial(self, batch: int) -> Memory:
        blank = self.fast.blank(batch)
        device = next(self.fast.parameters()).device
        never = torch.full((batch,), -1, device=device)
        thought = {**blank, "t": never}
        return _joined(
            slow=self.slow.initial(batch),
            held=thought,
            coming={name: value.clone() for name, value in thought.items()} if self.config.deadline else {},
            fast=self.after.initial(batch),
        ) | {"due": torch.zeros_like(never)}

    def observe(
        self, backbone: Backbone, inputs: ModelInputs, memory: Memory, t: torch.Tensor
    ) -> tuple[Features, Memory]:
        slow, held, coming, fast = (_part(memory, name) for name in ("slow", "held", "coming", "fast"))
        due = memory["due"]
        if coming:
            there = (coming["t"] >= 0) & (t >= coming["t"] + self.config.deadline)
            held = select(there, coming, held)
        stale = (held["t"] < 0) | (t - held["t"] >= self.config.staleness)
        thinks = stale | (t >= due)
        if thinks.any():
            rows = thinks.nonzero()[:, 0]
            features, states = self.slow.observe(
                backbone, inputs.map(lambda x: x[rows]), _rows(slow, rows), t[rows]
            )
            slow, due = _put(slow, rows, states), due.index_copy(0, rows, t[rows] + self.config.period)
            new = {**self.fast.thought(features), "t": t[rows]}
            if coming:
                coming = _put(coming, rows, new)
                held = select(stale, coming, held)
            else:
                held = _put(held, rows, new)
        seen = self.fast.look(backbone, inputs, held, t - held["t"])
        seen, fast = self.after.step(seen, fast, t)
        return seen, _joined(slow=slow, held=held, coming=coming, fast=fast) | {"due": due}

    def window(
        self, backbone: Backbone, batch: StepBatch, memory: Memory
    ) -> tuple[Features, Memory, torch.Tensor | None]:
        slow, held, coming, fast = (_part(memory, name) for name in ("slow", "held", "coming", "fast"))
        thinks, source, thought_t, due = self._drawn(batch, held["t"], memory["due"])
        features, slow, loss = self._thoughts(backbone, replace(batch, valid=thinks), slow)
        shape, lanes = batch.valid.shape, torch.arange(len(batch.valid), device=batch.t.device)[:, None]
        kept = {
            name: torch.cat([held[name][:, None].to(new.dtype), new], 1)[lanes, source + 1]
            for name, new in self.fast.thought(features).items()
        }
        flat = {name: value.flatten(0, 1) for name, value in kept.items()}
        seen = self.fast.look(backbone, batch.inputs.flatten(), flat, (batch.t - thought_t).flatten())
        seen = seen.map(lambda x: x.reshape(*shape, *x.shape[1:]))
        seen, fast = self.after.scan(seen, fast, batch.t, batch.is_first, batch.valid)
        losses = [x for x in (loss, self.fast.thinking_loss(features, batch, thinks)) if x is not None]
        held = {name: value[:, -1] for name, value in kept.items()} | {"t": thought_t[:, -1]}
        after = _joined(slow=slow, held=held, coming=coming, fast=fast) | {"due": due}
        return seen, after, sum(losses[1:], losses[0]) if losses else None

    def _thoughts(
        self, backbone: Backbone, batch: StepBatch, memory: Memory
    ) -> tuple[Features, Memory, torch.Tensor | None]:
        """As the mechanism's own `window`, without a pass through the backbone for steps that are not valid."""
        if self.slow.feeds_backbone:
            return self.slow.window(backbone, batch, memory)
        inputs, places = batch.inputs.flatten(), batch.valid.flatten()
        rows = places.nonzero()[:, 0] if places.any() else torch.zeros(1, dtype=torch.long, device=places.device)
        some = backbone(inputs.map(lambda x: x[rows])).features
        features = some.map(lambda x: x.new_zeros(len(places), *x.shape[1:]).index_copy(0, rows, x))
        features = features.map(lambda x: x.reshape(*batch.valid.shape, *x.shape[1:]))
        features, memory = self.slow.scan(features, memory, batch.t, batch.is_first, batch.valid)
        return features, memory, None

    def at_once(self, backbone: Backbone, inputs: ModelInputs, features: Features) -> Features:
        """At an episode's first step, from what the backbone has made of it, with nothing remembered."""
        first = torch.zeros(len(inputs.images), dtype=torch.long, device=inputs.images.device)
        return self.fast.look(backbone, inputs, self.fast.thought(features), first)

    def _drawn(
        self, batch: StepBatch, held_t: torch.Tensor, due: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """When the slow part thinks in a window, drawn from the steps' noise seeds.

        Returns:
            bool [B, K], the steps that think; int64 [B, K], the step of the window whose thought is acted on, -1
            for the one before the window; int64 [B, K], that thought's control step; int64 [B], `due` afterwards.
        """
        source = torch.full_like(due, -1)
        columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for k in range(batch.t.shape[1]):
            t = batch.t[:, k]
            now = batch.valid[:, k] & (batch.is_first[:, k] | (held_t < 0) | (t >= due))
            due = torch.where(now, t + 1 + batch.noise_seed[:, k] % self.config.staleness, due)
            source, held_t = torch.where(now, k, source), torch.where(now, t, held_t)
            columns.append((now, source, held_t))
        thinks, sources, times = (torch.stack(one, 1) for one in zip(*columns, strict=True))
        return thinks, sources, times, due


def part_of(name: str) -> str:
    """To which part, "slow" or "fast", this entry of the memory belongs."""
    return "fast" if name.startswith("fast/") else "slow"


def _part(memory: Memory, part: str) -> Memory:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): value for name, value in memory.items() if name.startswith(prefix)}


def _joined(**parts: Memory) -> Memory:
    return {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}


def _rows(memory: Memory, rows: torch.Tensor) -> Memory:
    return {name: value[rows] for name, value in memory.items()}


def _put(memory: Memory, rows: torch.Tensor, new: Memory) -> Memory:
    """[B, ...] with rows int64 [b] replaced by those of `new` [b, ...]."""
    return {name: value.index_copy(0, rows, new[name].to(value.dtype)) for name, value in memory.items()}
