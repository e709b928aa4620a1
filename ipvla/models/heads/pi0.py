"""The `pi0` head: the action expert of pi0, pi0.5 and SmolVLA (arXiv 2410.24164, 2504.16054, 2506.01844).

A Gemma of its own width, whose tokens read their own keys and values and, layer by layer, those of the backbone's
tokens, which do not read the expert's. So the backbone runs once per chunk, the expert at each step of the flow:

    x_t = t noise + (1 - t) actions,   v = noise - actions,   x <- x - v / steps from t = 1 (noise) down to 0

The paper counts the time the other way round; this is how the published programs and weights have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.backbones.decoder import score_bias
from ipvla.models.features import Features, LayerStates, Reads
from ipvla.models.heads.flow import per_token
from ipvla.models.heads.flow_matching import IntegratingConfig, drawn_prefix
from ipvla.models.heads.guidance import resumed, usable
from ipvla.models.heads.integrators import integrate, require_integrator
from ipvla.models.heads.protocol import Head, HeadConfig, Rest, masked_mean
from ipvla.models.heads.smolvla_expert import Prefix, SmolVLAExpert, by_head

Variant = Literal["pi0", "pi05", "smolvla"]


@HeadConfig.register_subclass("pi0")
@dataclass(frozen=True)
class Pi0HeadConfig(IntegratingConfig):
    """Sizes are those of the published 300M expert.

    Attributes:
        variant: "pi0": the state is a token in front of the actions', the time joins every action's token.
            "pi05": the time scales, shifts and gates every layer, and the state is the prompt's affair.
            "smolvla": as pi0, with SmolVLA's expert, and the state is the backbone's affair.
        width, layers, mlp, heads, key_heads, head_size: of the expert; the last three are the backbone's too.
        dims: numbers per action and per state inside the model, of which the real ones come first and the others
            are 0.
        self_attention_every: of SmolVLA's layers, those that read the actions' own keys.
        steps, integrator: of the flow, per chunk; `evaluate` and `serve` take others as well.
        min_period, max_period: of the time's sines and cosines.
        time_power, time_scale, time_offset: in training t = offset + scale u^(1 / power), u uniform: a beta
            distribution of (power, 1).
        prefix: as of `flow`; published weights have learned none.
    """

    variant: Variant = "pi0"
    width: int = 1024
    layers: int = 18
    mlp: int = 4096
    heads: int = 8
    key_heads: int = 1
    head_size: int = 256
    dims: int = 32
    self_attention_every: int = 2
    steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0
    time_power: float = 1.5
    time_scale: float = 0.999
    time_offset: float = 0.001
    integrator: str = "euler"
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"head.variant is {self.variant!r}; choose one of {', '.join(get_args(Variant))}")
        require_integrator(self.steps, self.integrator, "head")
        if self.prefix and self.dims < 2:
            raise ValueError(f"head.prefix needs head.dims of 2 or more, and it is {self.dims}")
        for name in ("layers", "dims", "self_attention_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width < 4 or self.width % 2:
            raise ValueError(f"head.width is {self.width}; it must be even and at least 4")

    @property
    def reads(self) -> Reads:
        return Reads(keys_values=tuple(range(self.layers)))

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> Pi0Head:
        if backbone.num_layers != self.layers or backbone.cache_size != self.key_heads * self.head_size:
            raise ValueError(
                f"head.layers {self.layers} and head.key_heads x head_size {self.key_heads * self.head_size} must "
                f"be the backbone's, {backbone.num_layers} and {backbone.cache_size}"
            )
        if max(action_dim, proprio if self.variant == "pi0" else 0) > self.dims:
            raise ValueError(
                f"head.dims is {self.dims}, and there are {action_dim} numbers per action and {proprio} per "
                "state; leave some out by data.proprio_index, or set head.dims higher and train the head anew"
            )
        return Pi0Head(self, backbone, chunk, action_dim)


class Pi0Head(Head):
    """See the module's docstring. Modules have their names in the published weights.

    The cognition, which memory enriches, is added to every action's token by `cognition_proj`, whose weights begin
    at 0: without training a chunk does not depend on it.
    """

    def __init__(self, config: Pi0HeadConfig, backbone: Backbone, chunk: int, action_dim: int) -> None:
        super().__init__()
        self.config = config
        self.action_dim = action_dim
        self.noise_shape = (chunk, config.dims)
        self.loss_noise_shape = (chunk + 1, config.dims)
        self.expert = SmolVLAExpert(config) if config.variant == "smolvla" else Expert(config)
        width = config.width
        self.action_in_proj = nn.Linear(config.dims, width)
        self.action_out_proj = nn.Linear(width, config.dims)
        if config.variant == "pi0":
            self.state_proj = nn.Linear(config.dims, width)
        if config.variant != "pi05":
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        else:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        self.cognition_proj = nn.Linear(backbone.width, width, bias=False)
        nn.init.zeros_(self.cognition_proj.weight)

    def velocity(self, features: Features, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """v float32 [B, C, dims] at x [B, C, dims] and times float32 in [0, 1], [B] or one per action, [B, C]."""
        assert features.layers is not None
        x = x.to(self.action_in_proj.weight.dtype)
        embedded = time_embedding(time, self.config).to(x.dtype)
        tokens, condition = self.action_in_proj(x), None
        if self.config.variant != "pi05":
            joined = torch.cat([tokens, per_token(embedded).expand_as(tokens)], -1)
            tokens = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(joined)))
        else:
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))
        tokens = tokens + self.cognition_proj(features.cognition.to(x.dtype))[:, None]
        if self.config.variant == "pi0":
            tokens = torch.cat([self.state_proj(self._padded(features.proprio.to(x.dtype)))[:, None], tokens], 1)
        states = self.expert(tokens, features.layers, condition)
        velocity: torch.Tensor = self.action_out_proj(states[:, -x.shape[1] :]).float()
        return velocity

    def losses(
        self, features: Features, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Squared error of the velocity, float32 [B, C, dims], at given noise [B, C, dims] and times.

        Times are float32 [B], or [B, C].
        """
        target = self._padded(actions.float())
        t = per_token(time[..., None])
        velocity = self.velocity(features, t * noise + (1 - t) * target, time)
        return (velocity - (noise - target)).square()

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert noise is not None
        config, noise, row = self.config, noise[:, :-1], noise[:, -1]
        drawn = row[:, 0]
        time = config.time_offset + config.time_scale * torch.special.ndtr(drawn) ** (1 / config.time_power)
        actions = actions.where(weight, 0.0)  # other actions of the chunk read those that do not exist
        if config.prefix:
            given = drawn_prefix(row[:, 1], config.prefix, actions.shape[1])
            time, weight = time[:, None].masked_fill(given, 0.0), weight & ~given[..., None]
        return masked_mean(self.losses(features, actions, noise, time)[..., : self.action_dim], weight)

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        assert noise is not None
        return self.flow(features, noise)[..., : self.action_dim]

    def resume(self, features: Features, noise: torch.Tensor | None, rest: Rest) -> torch.Tensor:
        assert noise is not None
        varies = self.action_varies
        if varies is None:
            varies = torch.ones(self.action_dim, dtype=torch.bool, device=noise.device)
        with torch.inference_mode(False):
            features = features.map(usable)
        chunk = resumed(
            lambda x, t: -self.velocity(features, x, 1 - t),
            noise.float(),
            replace(rest, actions=self._padded(rest.actions)),
            self._padded(varies),
            self.config.steps,
            self.config.integrator,
        )
        return chunk[..., : self.action_dim]

    def flow(self, features: Features, noise: torch.Tensor) -> torch.Tensor:
        """From noise to a chunk, float32 [B, C, dims]."""

        def field(x: torch.Tensor, t: float) -> torch.Tensor:
            return -self.velocity(features, x, torch.full((len(x),), 1 - t, device=x.device))

        return integrate(field, noise.float(), self.config.steps, self.config.integrator)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, self.config.dims - x.shape[-1]))


def time_embedding(time: torch.Tensor, config: Pi0HeadConfig) -> torch.Tensor:
    """Sines, then cosines, of a time float32 [...] at geometric periods: float64 [..., width].

    In float32 the fastest one, of 250 turns, would be off by 1e-4.
    """
    share = torch.linspace(0, 1, config.width // 2, dtype=torch.float64, device=time.device)
    period = config.min_period * (config.max_period / config.min_period) ** share
    angle = time.double()[..., None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Expert(nn.Module):
    """Gemma's layers without words, which read a prefix that they do not compute."""

    def __init__(self, config: Pi0HeadConfig) -> None:
        from transformers import GemmaConfig
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaRotaryEmbedding

        super().__init__()
        self.head_size = config.head_size
        gemma = GemmaConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            intermediate_size=config.mlp,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_heads,
            head_dim=config.head_size,
        )
        gemma._attn_implementation = "sdpa"
        timed = config.variant == "pi05"
        self.layers = nn.ModuleList(ExpertLayer(gemma, layer, timed) for layer in range(config.layers))
        self.norm = TimedNorm(config.width) if timed else GemmaRMSNorm(config.width)
        self.rotary = GemmaRotaryEmbedding(gemma)

    def forward(
        self, tokens: torch.Tensor, prefix: LayerStates, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Last hidden states [B, S, width].

        Args:
            tokens: [B, S, width], which read the prefix and each other; without a condition the first one is the
                state's, which reads none of the others.
            condition: [B, width], or [B, S, width], of `TimedNorm`, if the layers have any.
        """
        batch, count = tokens.shape[:2]
        own = torch.ones(count, count, dtype=torch.bool, device=tokens.device)
        if condition is None:
            own[0, 1:] = False
        visible = torch.cat([prefix.valid[:, None].expand(-1, count, -1), own.expand(batch, -1, -1)], -1)
        bias = score_bias(visible, tokens.dtype)
        positions = prefix.valid.sum(-1, keepdim=True) + torch.arange(count, device=tokens.device)
        rotation = self.rotary(tokens, positions)
        earlier = Prefix(*(by_head(x, self.head_size).to(tokens.dtype) for x in (prefix.keys, prefix.values)))
        for layer in self.layers:
            tokens = layer(tokens, condition, attention_mask=bias, position_embeddings=rotation, past=earlier)
        states: torch.Tensor = self.norm(tokens) if condition is None else self.norm(tokens, condition)[0]
        return states


class ExpertLayer(nn.Module):
    """A layer of Gemma; with `timed` its norms depend on the time, and gate what the layer adds."""

    def __init__(self, gemma: Any, layer: int, timed: bool) -> None:
        from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP, GemmaRMSNorm

        super().__init__()
        norm = TimedNorm if timed else GemmaRMSNorm
        self.self_attn = GemmaAttention(gemma, layer)
        self.mlp = GemmaMLP(gemma)
        self.input_layernorm = norm(gemma.hidden_size)
        self.post_attention_layernorm = norm(gemma.hidden_size)

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None, past: Prefix, **how: Any) -> torch.Tensor:
        added: torch.Tensor
        if condition is None:
            x = x + self.self_attn(self.input_layernorm(x), past_key_values=past, **how)[0]
            added = self.mlp(self.post_attention_layernorm(x))
            return x + added
        y, gate = self.input_layernorm(x, condition)
        x = x + gate * self.self_attn(y, past_key_values=past, **how)[0]
        y, gate = self.post_attention_layernorm(x, condition)
        added = gate * self.mlp(y)
        return x + added


class TimedNorm(nn.Module):
    """RMS norm with scale, shift and gate from a condition (adaptive norm, as in DiT, arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, S, width], condition [B, width] -> normed [B, S, width] and gate [B, 1, width].

        With a condition for each token, [B, S, width], the gate has S too.
        """
        scale, shift, gate = per_token(self.dense(condition)).chunk(3, -1)
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale.float()) + shift.float()
        return normed.to(x.dtype), gate.to(x.dtype)
