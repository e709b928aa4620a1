"""Real mechanisms of small size, and made-up features for them to remember."""

import torch

from ipvla.models.backbones import TinyConfig
from ipvla.models.features import Features
from ipvla.models.memory import MemoryConfig, MemoryModule
from ipvla.types import Memory

WIDTH, TOKENS, PERCEPTION = 6, 5, 4
BACKBONE = TinyConfig(width=WIDTH, heads=2, mlp=4, trunk_channels=PERCEPTION - 2).build(3, 1, 16)


def build(config: MemoryConfig) -> MemoryModule:
    """The mechanism with no weight at zero, as after some training."""
    torch.manual_seed(0)
    module = config.build(BACKBONE)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def features(*shape: int, seed: int = 0) -> Features:
    """Random features with leading axes `shape`."""
    random = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(*shape, WIDTH, generator=random),
        torch.randn(*shape, TOKENS, PERCEPTION, generator=random),
        torch.randn(*shape, 2, generator=random),
    )


def times(*shape: int) -> torch.Tensor:
    """Control steps 0, 4, 8, ... along the last axis."""
    return torch.arange(shape[-1]).expand(shape) * 4


def run(
    module: MemoryModule, x: Features, memory: Memory | None = None, first_t: int = 0
) -> tuple[Features, Memory]:
    """One uninterrupted window [B, K], from `memory` or from an episode's start."""
    batch, length = x.cognition.shape[:2]
    on = torch.ones(batch, length, dtype=torch.bool)
    memory = module.initial(batch) if memory is None else memory
    return module.scan(x, memory, times(batch, length) + first_t, ~on, on)


def changed(x: Features, step: int) -> Features:
    """The same window, but for what is seen at one step."""
    other = features(*x.cognition.shape[:2], seed=99)
    return Features(
        *(torch.cat([a[:, :step], b[:, step : step + 1], a[:, step + 1 :]], 1) for a, b in _pairs(x, other))
    )


def _pairs(x: Features, y: Features) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x.cognition, y.cognition), (x.perception, y.perception), (x.proprio, y.proprio)]


def equal(a: Memory, b: Memory, atol: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)
