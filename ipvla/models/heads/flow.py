"""`flow`: an expert of its own width that attends to the backbone's keys and values (pi0, RDT2-FM).

One block for every layer l that is read, D = `hidden`, all attention with the backbone's size of a head and number
of key heads, c = [time, proprioception, glimpse] (RDT2, arXiv 2602.03310; adaLN-zero: Peebles and Xie, arXiv
2212.09748; the glimpse, which carries the memory, is this project's):

    h = MLP(x_t) with registers behind it, plus learned positions            [B, C + registers, D]
    (shift, scale, gate) x 3 = Linear(SiLU(c))
    h = h + gate1 * SelfAttention(mod1(RMS(h)))
    h = h + gate2 * CrossAttention(mod2(RMS(h)); K_l, V_l)                   mod(y) = y (1 + scale) + shift
    h = h + gate3 * SwiGLU(mod3(RMS(h)))
    v = MLP(mod(RMS(h)))                                                     [B, C, A]

K_l and V_l are the backbone's own, with no projection between: they are computed once per chunk. With `attention:
shared` (pi0, arXiv 2410.24164) the first two are one attention over both sets of keys. Modulations and the last
layer begin at 0, so that the velocity does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features, Reads
from ipvla.models.heads.flow_matching import Conditions, FlowMatchingConfig, FlowMatchingHead, TimeEmbedding
from ipvla.models.heads.protocol import HeadConfig

_EPS = 1e-5


@HeadConfig.register_subclass("flow")
@dataclass(frozen=True)
class FlowConfig(FlowMatchingConfig):
    """See the module's docstring.

    Attributes:
        layers: of the backbone, from 0 on or from -1 back, one for each block; null for every layer.
        heads: of the expert's attention, a multiple of the backbone's key heads; null for as many as the backbone.
        registers: learned tokens behind the actions.
        multiple_of: the inner size of a block's MLP is the next multiple of this above 8 / 3 of the width.
        time_scale: what t is multiplied by before its sines; RDT2's weights have 1.
        attention: `cross`, self-attention and then cross-attention; or `shared`, one over both.
    """

    layers: tuple[int, ...] | None = None
    heads: int | None = None
    registers: int = 4
    multiple_of: int = 16
    time_scale: float = 1000.0
    attention: Literal["cross", "shared"] = "cross"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers == ():
            raise ValueError("head.layers is empty; name one layer for each block, or set it to null for all")
        if self.attention not in ("cross", "shared"):
            raise ValueError(f"head.attention is {self.attention!r}; choose cross or shared")

    @property
    def reads(self) -> Reads:
        return Reads(keys_values=self.layers)

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> FlowHead:
        return FlowHead(self, backbone, proprio, (chunk, action_dim))


class FlowHead(FlowMatchingHead):
    """See the module's docstring. ValueError if the heads do not fit the backbone's key heads."""

    times_per_action = True

    def __init__(self, config: FlowConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]) -> None:
        super().__init__(config, backbone, proprio, shape)
        self.config, width, (chunk, action_dim) = config, config.hidden, shape
        key_heads, heads = backbone.key_heads or backbone.heads, config.heads or backbone.heads
        if heads % key_heads:
            raise ValueError(f"head.heads is {heads}; the backbone has {key_heads} key heads, give a multiple")
        self.key_heads = key_heads
        sizes = Sizes(width, heads, key_heads, backbone.cache_size // key_heads)
        depth = len(config.reads.of(backbone.num_layers).keys_values or ())
        self.action_in = three_layers(action_dim, width)
        self.state_in = three_layers(proprio, width)
        self.time_in = TimeEmbedding(width)
        self.registers = nn.Parameter(torch.randn(config.registers, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(chunk + config.registers, width) * 0.02)
        self.blocks = nn.ModuleList(Block(sizes, 3 * width, config) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=_EPS)
        self.modulation = zeroed(nn.Linear(3 * width, 2 * width))
        last = zeroed(nn.Linear(4 * width, action_dim))
        self.action_out = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), last)

    def conditions(self, features: Features) -> Conditions:
        states = features.layers
        assert states is not None

        def split(cached: torch.Tensor) -> list[torch.Tensor]:
            return list(cached.reshape(*cached.shape[:3], self.key_heads, -1).transpose(2, 3).unbind(1))

        vector = torch.cat([self.state_in(features.proprio), self.glimpse(features)], -1)
        pairs = list(zip(split(states.keys), split(states.values), strict=True))
        return Conditions(vector, pairs, states.valid[:, None, None])

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        time = self.time_in(t * self.config.time_scale)
        vector = conditions.vector
        if t.ndim > 1:  # registers have the last action's time, which is never given
            time = torch.cat([time, time[:, -1:].expand(-1, len(self.registers), -1)], 1)
            vector = vector[:, None].expand(-1, time.shape[1], -1)
        c = F.silu(torch.cat([time, vector], -1))
        h = self.action_in(x)
        h = torch.cat([h, self.registers.to(h.dtype).expand(len(x), -1, -1)], 1) + self.positions
        for block, pair in zip(self.blocks, conditions.pairs, strict=True):
            h = block(h, c, pair, conditions.readable)
        shift, scale = per_token(self.modulation(c))[:, : x.shape[1]].chunk(2, -1)
        v: torch.Tensor = self.action_out(modulated(self.norm(h[:, : x.shape[1]]), shift, scale))
        return v.float()


@dataclass(frozen=True)
class Sizes:
    """width: D; heads: of queries; key_heads: of keys and values, a divisor; size: of one head."""

    width: int
    heads: int
    key_heads: int
    size: int


class Block(nn.Module):
    """One layer of the expert: h [B, M, D], condition [B, 3 D], or [B, M, 3 D] for one of each token."""

    def __init__(self, sizes: Sizes, condition: int, config: FlowConfig) -> None:
        super().__init__()
        width = sizes.width
        self.shared = config.attention == "shared"
        parts = 2 if self.shared else 3
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=_EPS) for _ in range(parts))
        self.modulation = zeroed(nn.Linear(condition, 3 * parts * width))
        self.own = Attention(sizes, own=True)
        self.cross = None if self.shared else Attention(sizes, own=False)
        inner = -(-(8 * width // 3) // config.multiple_of) * config.multiple_of
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        h: torch.Tensor,
        c: torch.Tensor,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
        readable: torch.Tensor,
    ) -> torch.Tensor:
        changed = per_token(self.modulation(c))
        changes = changed.reshape(*changed.shape[:2], -1, 3, h.shape[-1]).unbind(2)
        attended: list[tuple[Attention, bool]] = [(self.own, self.shared)]
        if self.cross is not None:
            attended.append((self.cross, True))
        for (attention, reads), norm, change in zip(attended, self.norms, changes, strict=False):
            shift, scale, gate = change.unbind(2)
            y = modulated(norm(h), shift, scale)
            h = h + gate * attention(y, pair if reads else None, readable)
        shift, scale, gate = changes[-1].unbind(2)
        y = modulated(self.norms[-1](h), shift, scale)
        out: torch.Tensor = h + gate * self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) over own keys, given ones, or both.

    Queries and own keys are normalised per head; keys that are given are taken as they are.
    """

    def __init__(self, sizes: Sizes, own: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.query = nn.Linear(sizes.width, sizes.heads * sizes.size, bias=False)
        self.query_norm = nn.RMSNorm(sizes.size, eps=_EPS)
        self.key_value = nn.Linear(sizes.width, 2 * sizes.key_heads * sizes.size, bias=False) if own else None
        self.key_norm = nn.RMSNorm(sizes.size, eps=_EPS) if own else None
        self.out = nn.Linear(sizes.heads * sizes.size, sizes.width, bias=False)

    def forward(
        self, y: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor] | None, readable: torch.Tensor
    ) -> torch.Tensor:
        """y [B, M, D]; `pair` and `readable` as in `Conditions`."""
        size = self.sizes.size
        q = _normed(self.query_norm, self.query(y).unflatten(-1, (-1, size))).transpose(1, 2)
        keys, values = [], []
        if self.key_value is not None and self.key_norm is not None:
            k, v = self.key_value(y).unflatten(-1, (2, -1, size)).unbind(2)
            keys.append(_normed(self.key_norm, k).transpose(1, 2))
            values.append(v.transpose(1, 2))
        mask = None
        if pair is not None:
            keys.insert(0, pair[0])
            values.insert(0, pair[1])
            mask = F.pad(readable, (0, y.shape[1] if self.key_value is not None else 0), value=True)
        k, v = (torch.cat([part.to(q.dtype) for part in parts], 2) for parts in (keys, values))
        grouped = self.sizes.heads != self.sizes.key_heads
        read = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
        out: torch.Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out


def _normed(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Under autocast as well, which does not know this norm."""
    out: torch.Tensor = norm(x.to(norm.weight.dtype))
    return out


def per_token(changes: torch.Tensor) -> torch.Tensor:
    """[B, M, D] as it is; [B, D], the same for all tokens, as [B, 1, D]."""
    return changes if changes.ndim > 2 else changes[:, None]


def modulated(y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y (1 + scale) + shift."""
    return y * (1 + scale) + shift


def three_layers(size: int, width: int) -> nn.Sequential:
    """An MLP to `width`."""
    layers = (nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
    return nn.Sequential(*layers)


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Its weights set to 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
