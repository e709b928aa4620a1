"""A vision-language model small enough to learn the Recall suite on a CPU in minutes.

A language-conditioned convolutional trunk (FiLM, Perez et al., arXiv 1709.07871) finds things; per-channel
spatial centroids (Levine et al., arXiv 1504.00702) say where they are; these visual tokens, the
proprioception and the prompt pass together through a pre-norm transformer (prefix attention, causal over an
answer). It is a `PreTrainedModel`: save, load and PEFT adapters work as for any Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ipvla.models.backbones.residual_trunk import Fuse, ResidualTrunk


class TinyVLMConfig(PreTrainedConfig):
    """Sizes of the network; `image_size` is the side in pixels, `proprio_dim` the size of the proprioception."""

    model_type = "ipvla_tiny"

    image_size: int = 64
    num_views: int = 1
    proprio_dim: int = 8
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 256
    trunk_channels: int = 64
    visual_tokens: int = 8
    trunk_blocks: int = 0
    max_text_tokens: int = 64
    vocab_size: int = 512


class TinyTrunk(nn.Module):
    """Images [B, V, H, W, 3], condition [B, D] -> map [B, V * h * w, C + 2] and its centroids [B, V * C * 3].

    h = H / 4. The last two channels of the map are the cell's coordinates in [-1, 1].
    """

    grid: torch.Tensor
    mean_image: torch.Tensor

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__()
        channels = config.trunk_channels
        self.conv1 = nn.Conv2d(3, channels // 2, 4, 2, 1)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, 2, 1)
        self.film = nn.Linear(config.hidden_size, 2 * channels)
        self.mix = nn.Linear(channels, channels)
        side = config.image_size // 4
        line = (torch.arange(side) + 0.5) * 2 / side - 1
        grid = torch.stack([line[None].expand(side, side), line[:, None].expand(side, side)], -1)
        self.register_buffer("grid", grid.reshape(side * side, 2))
        self.register_buffer("mean_image", torch.full((3, config.image_size, config.image_size), 127.5))

    def calibrate(self, mean_image: torch.Tensor) -> None:
        """Centres pictures on this one, float [3, H, W]."""
        self.mean_image.copy_(mean_image)

    def forward(
        self, images: torch.Tensor, condition: torch.Tensor, fuse: Fuse | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b, v = images.shape[:2]
        x = images.flatten(0, 1).permute(0, 3, 1, 2)
        x = ((x - self.mean_image) / 40).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = x.flatten(2).transpose(1, 2)
        x = x.reshape(b, v * x.shape[1], -1)
        x = x if fuse is None else fuse(x)
        scale, shift = self.film(condition)[:, None].chunk(2, -1)
        x = F.relu(self.mix(x * (1 + 2 * scale)) + shift)
        weight = x.float().square().reshape(b, v, -1, x.shape[-1])
        mass = weight.sum(2)
        centroid = weight.transpose(2, 3) @ self.grid / (mass[..., None] + 1e-2)
        mass = (mass / weight.shape[2]).clamp(max=4)[..., None]
        perception = torch.cat([x, self.grid.to(x.dtype).repeat(b, v, 1)], -1)
        return perception, torch.cat([centroid, mass], -1).flatten(1)


#: Keys [B, S, D], values [B, S, D] and bias [B, heads, S] of earlier tokens.
Past = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class TinyLayer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)); [B, N, D]."""

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(d)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(d)
        self.up_proj = nn.Linear(d, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, d)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        y = self.attention_norm(x)
        q, k, v = (self._heads(p(y)) for p in (self.q_proj, self.k_proj, self.v_proj))
        scale = q.shape[-1] ** -0.5
        # written out: on the CPU the fused kernel is slower than this for so few tokens
        score = ((q @ k.transpose(-1, -2)).float() * scale).masked_fill(~mask, -torch.inf)
        if past is not None:
            keys, values, bias = past
            earlier = (q @ self._heads(keys).transpose(-1, -2)).float() * scale + bias[:, :, None]
            score, v = torch.cat([earlier, score], -1), torch.cat([self._heads(values).to(v.dtype), v], 2)
        y = score.softmax(-1).to(v.dtype) @ v
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        out: torch.Tensor = x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x))))
        return out

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens that enter this layer as x [B, S, D] offer to attention: keys and values, each [B, S, D]."""
        y = self.attention_norm(x)
        return self.k_proj(y), self.v_proj(y)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class TinyVLM(PreTrainedModel):
    """The network; see the module's docstring."""

    config_class = TinyVLMConfig
    base_model_prefix = "tiny"

    def __init__(self, config: TinyVLMConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(config.max_text_tokens, d) * 0.3)
        self.language = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.language_norm = nn.LayerNorm(d)
        self.proprio = nn.Sequential(nn.Linear(config.proprio_dim, d), nn.GELU(), nn.Linear(d, d))
        self.proprio_norm = nn.LayerNorm(d)
        self.condition = nn.Linear(2 * d, d)
        self.trunk: TinyTrunk | ResidualTrunk = (
            ResidualTrunk(config.image_size, config.num_views, config.trunk_channels, config.trunk_blocks, d)
            if config.trunk_blocks
            else TinyTrunk(config)
        )
        self.summary = nn.Linear(3 * config.num_views * config.trunk_channels, d)
        self.visual = nn.Linear(3 * config.num_views * config.trunk_channels, config.visual_tokens * d)
        self.visual_positions = nn.Parameter(torch.randn(config.visual_tokens + 1, d) * 0.3)
        self.layers = nn.ModuleList(TinyLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(d)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation stands."""

    @property
    def perception_size(self) -> int:
        return int(self.config.trunk_channels) + 2

    @property
    def text_start(self) -> int:
        """Index of the prompt's first token: the visual tokens and the proprioception come before it."""
        return int(self.config.visual_tokens) + 1

    def embed(
        self,
        images: torch.Tensor,
        proprio: torch.Tensor,
        input_ids: torch.Tensor,
        prefix: torch.Tensor,
        fuse: Fuse | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens [B, N, D] and the visual map [B, Np, Dp].

        Args:
            prefix: bool [B, L], True on the prompt's tokens.
            fuse: adds to the trunk's cells [B, Np, C], before the instruction modulates them, what points say.
        """
        words = self.embed_tokens(input_ids) + self.positions[: input_ids.shape[1]]
        sentence = self.language(words)
        weight = prefix[..., None].to(sentence.dtype)
        sentence = self.language_norm((sentence * weight).sum(1) / weight.sum(1).clamp(min=1))
        body = self.proprio_norm(self.proprio(proprio))
        perception, centroids = self.trunk(images, self.condition(torch.cat([sentence, body], -1)), fuse)
        visual = self.visual(centroids.to(sentence.dtype)).unflatten(-1, (self.config.visual_tokens, -1))
        last = F.one_hot(prefix.sum(-1) - 1, input_ids.shape[1])[..., None].to(words.dtype)
        words = words + last * (self.summary(centroids.to(sentence.dtype)) + body)[:, None]
        return torch.cat([torch.cat([visual, body[:, None]], 1) + self.visual_positions, words], 1), perception

    def run(
        self, x: torch.Tensor, mask: torch.Tensor, past: Sequence[Past] | None = None, first: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Tokens x [B, N, D] through the layers from `first` on; `mask` bool [B, 1, 1 or N, N] says which keys a
        query may read, `past` what each of these layers reads besides. Returns x and each layer's output."""
        hidden = [x]
        for i, layer in enumerate(self.layers[first:]):
            hidden.append(layer(hidden[-1], mask, None if past is None else past[i]))
        return tuple(hidden)

    def reply_mask(self, prompt: torch.Tensor, reply: torch.Tensor) -> torch.Tensor:
        """bool [B, 1, N, N]: a reply's tokens read the prompt and the reply before them, the prompt's only itself.

        `prompt` and `reply` are bool [B, L], True where a token belongs to the one or the other.
        """
        prompts, replies = (F.pad(x, (self.text_start, 0), value=v) for x, v in ((prompt, True), (reply, False)))
        n = replies.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=reply.device).tril()
        return prompts[:, None, None] | (replies[:, None, :, None] & replies[:, None, None] & causal)

    def lm_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., D] -> vocabulary logits [..., vocab], tied to the embedding."""
        logits: torch.Tensor = self.norm(hidden) @ self.embed_tokens.weight.T
        return logits
