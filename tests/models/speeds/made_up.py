"""A small model at two speeds, and a lane's window and an episode's observations for it."""

from __future__ import annotations

from typing import Any

import torch

from ipvla.models.backbones import TinyConfig
from ipvla.models.heads import RegressionConfig
from ipvla.models.memory import GRUMemoryConfig, MemoryConfig
from ipvla.models.speeds import SpeedsConfig, TwoSpeeds
from ipvla.models.vla import IPVLA, IPVLAConfig
from ipvla.types import Memory, ModelInputs, StepBatch
from tests.models.conftest import inputs_for

SIDE, CHUNK, ACTIONS = 28, 2, 3
GRU = GRUMemoryConfig(hidden=8)


def model(speeds: SpeedsConfig, memory: MemoryConfig = GRU) -> IPVLA:
    """With random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = IPVLAConfig(
        backbone=TinyConfig(width=32, heads=2, layers=3, mlp=32, trunk_channels=8),
        memory=memory,
        head=RegressionConfig(hidden=16),
        chunk=CHUNK,
        speeds=speeds,
    )
    return config.build(torch.ones(ACTIONS, dtype=torch.bool), 5, 1, SIDE).eval()


def two(of: IPVLA) -> TwoSpeeds:
    """The part of the model that is at two speeds."""
    assert isinstance(of.memory, TwoSpeeds)
    return of.memory


def seen(of: IPVLA, batch: int, seed: int = 0) -> ModelInputs:
    """Random observations [B, ...], with prompts of different lengths."""
    words = ["press the red button", "place", "press the button that lit up"]
    return inputs_for(of.backbone, [words[i % 3] for i in range(batch)], seed)


def window(of: IPVLA, lanes: int = 3, steps: int = 8, stride: int = 2, **changes: Any) -> StepBatch:
    """A window [B, K, ...] of episodes that all begin with it."""
    shape = (lanes, steps)
    t = (torch.arange(steps) * stride).expand(shape)
    drawn = torch.Generator().manual_seed(1)
    values: dict[str, Any] = {
        "inputs": seen(of, lanes * steps).map(lambda x: x.reshape(*shape, *x.shape[1:])),
        "actions": torch.rand(*shape, CHUNK, ACTIONS, generator=drawn),
        "action_valid": torch.ones(*shape, CHUNK, dtype=torch.bool),
        "is_first": t == 0,
        "valid": torch.ones(shape, dtype=torch.bool),
        "t": t,
        "episode_key": torch.zeros(shape, dtype=torch.long),
        "noise_seed": torch.randint(2**62, shape, generator=drawn),
        **{name: torch.zeros(*shape, 0, dtype=torch.long) for name in ("plan", "last_plan", "question", "answer")},
    }
    return StepBatch(**values | changes)


def play(of: IPVLA, calls: list[int], batch: int = 1) -> tuple[list[torch.Tensor], list[Memory]]:
    """Chunks [B, C, A] and memories after calls at these control steps, of `batch` equal episodes."""
    memory, chunks, memories = of.initial_memory(batch), [], []
    for t in calls:
        one = seen(of, 1, seed=t).map(lambda x: x.expand(batch, *x.shape[1:]))
        actions, memory = of.act(one, memory, torch.full((batch,), t))
        chunks.append(actions)
        memories.append(memory)
    return chunks, memories
