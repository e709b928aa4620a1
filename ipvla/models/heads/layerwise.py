"""`layerwise`: a diffusion transformer whose block i attends to the language layer f(i) (starVLA's QwenPI, GR00T).

Tokens are the state, learned future tokens and the noisy actions; e = [W1 x_t; sines(k)], k = floor(1000 t):

    h = [MLP(state); future; W3 swish(W2 e) + position]              [B, 1 + F + C, D]
    c = MLP(sines(k)) + W glimpse                                    what memory makes of the scene
    h = h + SelfAttention(AdaLN(h, c))                               AdaLN(h, c) = LN(h) (1 + scale) + shift
    h = h + CrossAttention(AdaLN(h, c); c_i)                         c_i as in `routing`
    h = h + MLP(LN(h))
    v = MLP(h) at the actions                                        [B, C, A]

W glimpse is this project's. The public head (starVLA 0ed0aad) has `self_attention: odd`, where odd blocks attend
to tokens and even ones to layers, and by default none at all: then no action sees another, and neither state nor
future tokens have any influence, so that they are left out here. It reads states as they are (`context_norm:
false`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.choices import did_you_mean
from ipvla.models.backbones import Backbone
from ipvla.models.features import Features, Reads
from ipvla.models.heads.flow import per_token
from ipvla.models.heads.flow_matching import (
    Conditions,
    FlowMatchingConfig,
    FlowMatchingHead,
    TimeEmbedding,
    waves,
)
from ipvla.models.heads.protocol import HeadConfig
from ipvla.models.heads.routing import RoutingConfig

SELF_ATTENTION = ("every", "odd", "none")


@HeadConfig.register_subclass("layerwise")
@dataclass(frozen=True)
class LayerwiseConfig(FlowMatchingConfig):
    """See the module's docstring; `hidden` is D.

    Attributes:
        layers: f, the layer whose output each block reads: l is the l-th one's, 0 the embeddings, -1 the last
            one's; null for a block for every layer.
        heads: of attention, a divisor of `hidden`.
        self_attention: in which blocks tokens attend to each other: every, odd, or none.
        future_tokens: F.
        mlp: inner size of the MLPs of state and output.
        context_norm: normalise a layer's states before they are read.
        routing: whether blocks learn what to read; then every layer's states are at hand.
    """

    layers: tuple[int, ...] | None = None
    heads: int = 4
    self_attention: str = "every"
    future_tokens: int = 8
    mlp: int = 256
    context_norm: bool = True
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.self_attention not in SELF_ATTENTION:
            hint = did_you_mean(self.self_attention, SELF_ATTENTION)
            raise ValueError(f"head.self_attention: {self.self_attention!r} is unknown; {hint}")
        if self.prefix and self.self_attention == "none":
            raise ValueError(
                f"head.prefix is {self.prefix}, and with head.self_attention none no action sees another; set the "
                "one to 0 or the other to every"
            )
        if self.layers == ():
            raise ValueError("head.layers is empty; name one layer for each block, or set it to null for all")
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(
                f"head.hidden is {self.hidden}; it must be even and a multiple of head.heads {self.heads}"
            )

    @property
    def reads(self) -> Reads:
        return Reads(hidden=None if self.routing.learned else self.layers)

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> LayerwiseHead:
        return LayerwiseHead(self, backbone, proprio, (chunk, action_dim))


class LayerwiseHead(FlowMatchingHead):
    """See the module's docstring. ValueError for layers that the backbone lacks."""

    times_per_action = True

    def __init__(self, config: LayerwiseConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]) -> None:
        super().__init__(config, backbone, proprio, shape)
        self.config, width, (chunk, action_dim) = config, config.hidden, shape
        #: The numbers of the layers that are read, and of those that blocks read by the fixed map.
        self.read = config.reads.of(backbone.num_layers).hidden or ()
        mapped = Reads(hidden=config.layers).of(backbone.num_layers).hidden or ()
        if unread := [layer for layer in mapped if layer not in self.read]:
            raise ValueError(f"head.layers names {unread}, and head.routing mixes the outputs of layers alone")
        places = tuple(self.read.index(layer) if config.routing.learned else i for i, layer in enumerate(mapped))
        self.routing = config.routing.build(places, len(self.read), backbone.width)
        self.action_in = ActionEncoder(action_dim, width)
        self.positions = nn.Parameter(torch.randn(chunk, width) * 0.02)
        mixes = config.self_attention != "none"
        self.state_in = two_layers(proprio, config.mlp, width) if mixes and proprio else None
        self.future = nn.Parameter(torch.randn(config.future_tokens, width) * 0.02) if mixes else None
        self.time_in = TimeEmbedding(width, shift=1)
        self.remembered = nn.Linear(config.hidden, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                attends=config.self_attention == "every" or (config.self_attention == "odd" and i % 2 == 1),
                context=None if config.self_attention == "odd" and i % 2 else backbone.width,
            )
            for i in range(len(mapped))
        )
        self.action_out = two_layers(width, config.mlp, action_dim)

    def conditions(self, features: Features) -> Conditions:
        states = features.layers
        assert states is not None
        hidden = states.hidden.float()
        if self.config.context_norm:
            hidden = _normed(hidden)
        routes = self.routing.routes(hidden, states.valid, features.cognition)
        context = self.routing.mix(hidden, routes)
        vector = [self.remembered(self.glimpse(features))]
        if self.state_in is not None:
            vector.append(self.state_in(features.proprio))
        blocks = cast("list[Block]", list(self.blocks))
        pairs = [block.context(c) for block, c in zip(blocks, context.unbind(1), strict=True)]
        return Conditions(torch.cat(vector, -1), pairs, states.valid[:, None, None], routes)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        bucket = (t * 1000).floor()
        remembered, *state = conditions.vector.chunk(1 + (self.state_in is not None), -1)
        tokens = [*(one[:, None] for one in state), self.action_in(x, bucket) + self.positions]
        if self.future is not None:
            tokens.insert(-1, self.future.expand(len(x), -1, -1))
        time = self.time_in(bucket)
        if t.ndim > 1:  # the other tokens have the last action's time, which is never given
            others = sum(token.shape[1] for token in tokens[:-1])
            time = torch.cat([time[:, -1:].expand(-1, others, -1), time], 1)
            remembered = remembered[:, None]
        c = F.silu(time + remembered)
        h = torch.cat([token.to(tokens[-1].dtype) for token in tokens], 1)
        for block, pair in zip(self.blocks, conditions.pairs, strict=True):
            h = block(h, c, pair, conditions.readable)
        v: torch.Tensor = self.action_out(h[:, -x.shape[1] :])
        return v.float()

    def further_terms(self, conditions: Conditions, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        routing, routes = self.config.routing, conditions.routes
        if routes is None or routes.probabilities is None or not routing.balance:
            return {}
        return {"routing/balance": routing.balance * routes.balance(weight.flatten(1).any(1))}

    def readings(self, conditions: Conditions) -> dict[str, torch.Tensor]:
        """`routing/BLOCK/LAYER`, mean weights of a batch, and their mean entropy."""
        routes = conditions.routes
        if routes is None or not self.config.routing.learned:
            return {}
        named = {"routing/entropy": routes.entropy}
        for block, row in enumerate(routes.weights.mean(0)):
            named |= {f"routing/{block}/{layer}": one for layer, one in zip(self.read, row, strict=True)}
        return named


class ActionEncoder(nn.Module):
    """x [B, C, A] and buckets of time, [B] or [B, C] -> [B, C, width]."""

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(action_dim, width), nn.Linear(2 * width, width)
        self.third = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        encoded = self.first(x)
        time = per_token(torch.cat(waves(bucket, self.width), -1)).expand(-1, x.shape[1], -1)
        out: torch.Tensor = self.third(F.silu(self.second(torch.cat([encoded, time.to(encoded.dtype)], -1))))
        return out


class Block(nn.Module):
    """h [B, M, D] with condition c [B, D], or [B, M, D] for one of each token.

    Args:
        attends: whether tokens attend to each other.
        context: size of the states that they attend to, None for none.
    """

    def __init__(self, width: int, heads: int, attends: bool, context: int | None) -> None:
        super().__init__()
        self.own = Attention(width, heads, width) if attends else None
        self.cross = None if context is None else Attention(width, heads, context)
        self.modulation = nn.Linear(width, 2 * width * (attends + (context is not None)))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def context(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of states [B, N, size]; None if the block reads none."""
        return None if self.cross is None else self.cross.pair(states)

    def forward(
        self,
        h: torch.Tensor,
        c: torch.Tensor,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
        readable: torch.Tensor,
    ) -> torch.Tensor:
        changes = per_token(self.modulation(c)).chunk(2 * sum(x is not None for x in (self.own, self.cross)), -1)
        if self.own is not None:
            y = _normed(h) * (1 + changes[0]) + changes[1]
            h = h + self.own(y, self.own.pair(y), None)
        if self.cross is not None and pair is not None:
            h = h + self.cross(_normed(h) * (1 + changes[-2]) + changes[-1], pair, readable)
        out: torch.Tensor = h + self.mlp(_normed(h))
        return out


class Attention(nn.Module):
    """Queries of width D, keys and values from states of `source` numbers; all with biases."""

    def __init__(self, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(source, width), nn.Linear(source, width)

    def pair(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, N, size of a head]."""
        return self._split(self.key(states)), self._split(self.value(states))

    def forward(
        self, y: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        q = self._split(self.query(y))
        read = F.scaled_dot_product_attention(q, pair[0].to(q.dtype), pair[1].to(q.dtype), mask)
        out: torch.Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


def two_layers(size: int, inner: int, out: int) -> nn.Sequential:
    """An MLP with ReLU."""
    return nn.Sequential(nn.Linear(size, inner), nn.ReLU(), nn.Linear(inner, out))


def _normed(h: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(h, h.shape[-1:])
