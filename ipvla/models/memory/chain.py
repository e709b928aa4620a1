"""Several mechanisms one after another: each reads the features as the one before it has enriched them.

    features, m_1 = first.observe(observation, m_1)
    features, m_i = part_i.step(features, m_i)   for i = 2, 3, ...

Only the first may feed the backbone (`latent`, `kv`, `prompt`), since the backbone runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule
from ipvla.types import Memory, ModelInputs, StepBatch


@MemoryConfig.register_subclass("chain")
@dataclass(frozen=True)
class ChainMemoryConfig(MemoryConfig):
    """parts: the mechanisms in order, at least two."""

    parts: list[MemoryConfig] = field(default_factory=list)  # draccus cannot write a tuple of exactly two choices

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(
                f"memory.parts holds {len(self.parts)} mechanisms; name at least two, or that one alone"
            )

    @property
    def feeds_backbone(self) -> bool:
        return self.parts[0].feeds_backbone

    @property
    def shards(self) -> bool:
        return all(part.shards for part in self.parts)

    @property
    def longest_plan(self) -> int:
        return max(part.longest_plan for part in self.parts)

    def check(self) -> None:
        for part in self.parts[1:]:
            if part.feeds_backbone:
                name = part.get_choice_name(type(part))
                raise ValueError(f"memory.parts: {name!r} feeds the backbone and must stand first in a chain")
        for part in self.parts:
            part.check()

    def build(self, backbone: Backbone) -> ChainMemory:
        self.check()
        return ChainMemory([config.build(backbone) for config in self.parts])


class ChainMemory(MemoryModule):
    """See the module's docstring. State: every part's own, its names prefixed by the part's place: `0.hidden`."""

    def __init__(self, parts: list[MemoryModule]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.feeds_backbone = parts[0].feeds_backbone
        self.plan_tokens = parts[0].plan_tokens

    def initial(self, batch: int) -> Memory:
        return self._join([part.initial(batch) for part in self._parts()])

    def close(self) -> bool:
        return min(part.close() for part in self._parts())  # every one, also behind one that cannot

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        states = self._split(memory)
        for i, part in enumerate(self._parts()):
            features, states[i] = part.step(features, states[i], t)
        return features, self._join(states)

    def observe(
        self, backbone: Backbone, inputs: ModelInputs, memory: Memory, t: torch.Tensor
    ) -> tuple[Features, Memory]:
        (first, *rest), states = self._parts(), self._split(memory)
        features, states[0] = first.observe(backbone, inputs, states[0], t)
        for i, part in enumerate(rest, 1):
            features, states[i] = part.step(features, states[i], t)
        return features, self._join(states)

    def window(
        self, backbone: Backbone, batch: StepBatch, memory: Memory
    ) -> tuple[Features, Memory, torch.Tensor | None]:
        (first, *rest), states = self._parts(), self._split(memory)
        features, states[0], loss = first.window(backbone, batch, states[0])
        for i, part in enumerate(rest, 1):
            features, states[i] = part.scan(features, states[i], batch.t, batch.is_first, batch.valid)
        return features, self._join(states), loss

    def _parts(self) -> Iterator[MemoryModule]:
        yield from self.parts  # type: ignore[misc]

    def _split(self, memory: Memory) -> list[Memory]:
        return [
            {name.removeprefix(f"{i}."): value for name, value in memory.items() if name.startswith(f"{i}.")}
            for i in range(len(self.parts))
        ]

    def _join(self, states: list[Memory]) -> Memory:
        return {f"{i}.{name}": value for i, state in enumerate(states) for name, value in state.items()}
