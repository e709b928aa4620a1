"""SmolVLA's action expert (arXiv 2506.01844): layers that read their own keys too, and layers that do not.

Of every `self_attention_every` layers the first attends, causally, to the prefix's keys and values and to the
actions' own. The others project the prefix's keys and values, already rotated, once more, and attend to these
alone; their queries are rotated as if the actions stood at the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.decoder import score_bias
from ipvla.models.features import LayerStates

if TYPE_CHECKING:
    from ipvla.models.heads.pi0 import Pi0HeadConfig


class SmolVLAExpert(nn.Module):
    """Llama's layers without words. Modules have their names in the published weights."""

    def __init__(self, config: Pi0HeadConfig) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

        super().__init__()
        self.head_size, self.every = config.head_size, config.self_attention_every
        llama = LlamaConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            intermediate_size=config.mlp,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_heads,
            head_dim=config.head_size,
            rms_norm_eps=1e-5,
        )
        llama._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(LlamaDecoderLayer(llama, layer) for layer in range(config.layers))
        size = config.key_heads * config.head_size
        for i, layer in enumerate(self.layers):
            if i % self.every:
                attention: Any = layer.self_attn
                attention.k_proj, attention.v_proj = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.norm = LlamaRMSNorm(config.width, eps=1e-5)
        self.rotary = LlamaRotaryEmbedding(llama)

    def forward(self, x: torch.Tensor, prefix: LayerStates, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states [B, C, width] of the actions' tokens [B, C, width]; there is no condition."""
        batch, count = x.shape[:2]
        causal = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        readable = prefix.valid[:, None].expand(-1, count, -1)
        bias = score_bias(torch.cat([readable, causal.expand(batch, -1, -1)], -1), x.dtype)
        places = torch.arange(count, device=x.device).expand(batch, -1)
        behind = self.rotary(x, prefix.valid.sum(-1, keepdim=True) + places)
        afresh = self.rotary(x, places)
        earlier = Prefix(*(by_head(y, self.head_size).to(x.dtype) for y in (prefix.keys, prefix.values)))
        for i, layer in enumerate(self.layers):
            if i % self.every:
                pair = prefix.keys[:, i].to(x.dtype), prefix.values[:, i].to(x.dtype)
                x = self._across(layer, x, pair, readable[:, None], afresh)
            else:
                x = layer(x, attention_mask=bias, position_embeddings=behind, past_key_values=earlier)
        states: torch.Tensor = self.norm(x)
        return states

    def _across(
        self,
        layer: Any,
        x: torch.Tensor,
        pair: tuple[torch.Tensor, torch.Tensor],
        readable: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """A layer that attends to the prefix's keys and values, each [B, N, Dk], alone."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention = layer.self_attn
        q = by_head(attention.q_proj(layer.input_layernorm(x)), self.head_size)
        q, _ = apply_rotary_pos_emb(q, q, *rotation)
        k, v = (by_head(project(y), self.head_size) for project, y in
                zip((attention.k_proj, attention.v_proj), pair, strict=True))  # fmt: skip
        read = F.scaled_dot_product_attention(q, k, v, readable, enable_gqa=True)
        x = x + attention.o_proj(read.transpose(1, 2).flatten(2))
        added: torch.Tensor = layer.mlp(layer.post_attention_layernorm(x))
        return x + added


@dataclass(frozen=True)
class Prefix:
    """What transformers' attention asks a cache for; it stores nothing. Both [B, layers, key heads, N, size]."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of this layer with further ones [B, key heads, M, size] behind them."""
        return torch.cat([self.keys[:, layer], keys], 2), torch.cat([self.values[:, layer], values], 2)


def by_head(flat: torch.Tensor, size: int) -> torch.Tensor:
    """[..., N, D] -> [..., D / size, N, size]."""
    return flat.reshape(*flat.shape[:-1], -1, size).transpose(-3, -2)
