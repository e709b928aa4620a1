"""OpenVLA's eyes: DINOv2 and SigLIP, or SigLIP alone, and the projector behind them (arXiv 2406.09246).

transformers' classes of both are exact, but they split `qkv`, so that published adapters do not fit; these have
the published names (timm's; LayerScale's weight is `scale_factor`). A tower gives the residual stream behind its
second-to-last block, without the final norm: what comes later is in the files, never runs and is never trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
import torch.nn.functional as F
from torch import nn

_EPS = 1e-6
#: On uint8 / 255: ImageNet's mean and deviation, and SigLIP's, as the published processors have them.
_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF: Final = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class TowerConfig:
    """One vision transformer.

    Attributes:
        dino: DINOv2 with class token, registers and LayerScale; else SigLIP with attention pooling.
        width, depth, heads, mlp: sizes; patch: side of a patch in pixels.
        registers: register tokens of DINOv2.
    """

    dino: bool
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int = 14
    registers: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.depth < 2:
            raise ValueError(
                f"a vision tower has width {self.width}, {self.heads} heads and depth {self.depth}; give a "
                "multiple of the heads, and at least 2 blocks"
            )

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.registers if self.dino else 0

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of the three channels, of pictures in [0, 1]."""
        return _IMAGENET if self.dino else _HALF

    @classmethod
    def from_timm(cls, values: dict[str, object]) -> Self:
        """From timm's terms: `embed_dim`, `depth`, `num_heads`, `mlp_hidden`, `reg_tokens`, `class_token`."""
        names = ("embed_dim", "depth", "num_heads", "mlp_hidden", "patch_size", "reg_tokens")
        width, depth, heads, mlp, patch, registers = (int(str(values[name])) for name in names)
        return cls(bool(values["class_token"]), width, depth, heads, mlp, patch, registers)


#: The towers of the published checkpoints by timm's names; heads cannot be told from the weights.
TOWERS: Final = {
    "vit_large_patch14_reg4_dinov2.lvd142m": TowerConfig(True, 1024, 24, 16, 4096, registers=4),
    "vit_so400m_patch14_siglip_224": TowerConfig(False, 1152, 27, 16, 4304),
}


class _Attention(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class _Block(nn.Module):
    """Pre-norm; with `film`, the words scale and shift what attention has made (OpenVLA-OFT, arXiv 2502.19645)."""

    def __init__(self, config: TowerConfig, film: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.width, _EPS), _Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.width, _EPS), _MLP(config.width, config.mlp)
        self.ls1, self.ls2 = (_LayerScale(config.width) if config.dino else nn.Identity() for _ in range(2))
        self.scale, self.shift = (nn.Linear(film, config.width) if film else None for _ in range(2))

    def forward(self, x: torch.Tensor, words: torch.Tensor | None) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if self.scale is not None and self.shift is not None:
            x = x * (1 + self.scale(words)[:, None]) + self.shift(words)[:, None]
        out: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class _PatchEmbedding(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return out


class _AttentionPool(nn.Module):
    """Weights that the files have; nothing reads them."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.width
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, _EPS), _MLP(width, config.mlp)


class Tower(nn.Module):
    """Pixels [B, 3, S, S] -> patches [B, (S / patch)^2, width]."""

    def __init__(self, config: TowerConfig, image_size: int, film: int = 0) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // config.patch) ** 2, config.width))
        if config.dino:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width))
        else:
            self.attn_pool = _AttentionPool(config)
        self.blocks = nn.ModuleList(_Block(config, film) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, _EPS)
        for unused in (self.blocks[-1], self.norm, getattr(self, "attn_pool", None)):
            if unused is not None:
                unused.requires_grad_(False)

    def forward(self, pixels: torch.Tensor, words: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embed(pixels) + self.pos_embed
        if self.config.dino:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], 1)
        for block in list(self.blocks)[:-1]:
            x = block(x, words)
        patches: torch.Tensor = x[:, self.config.prefix :]
        return patches


class PrismaticVision(nn.Module):
    """Pictures uint8 [B, V, S, S, 3] -> patches [B, V * patches, width], the towers side by side on the last axis.

    `featurizer` and `fused_featurizer` are the published names; a single tower is `featurizer`. With `film` > 0,
    the size of a word, `words` [B, film] modulate every block.
    """

    def __init__(self, towers: Sequence[TowerConfig], image_size: int, film: int = 0) -> None:
        super().__init__()
        self.featurizer = Tower(towers[0], image_size, film)
        self.fused_featurizer = Tower(towers[1], image_size, film) if len(towers) > 1 else None

    @property
    def towers(self) -> list[Tower]:
        return [tower for tower in (self.featurizer, self.fused_featurizer) if tower is not None]

    @property
    def width(self) -> int:
        return sum(tower.config.width for tower in self.towers)

    def forward(self, images: torch.Tensor, words: torch.Tensor | None = None) -> torch.Tensor:
        batch, views = images.shape[:2]
        words = None if words is None else words.repeat_interleave(views, 0)
        seen = [tower(pixels, words) for tower, pixels in zip(self.towers, self.pixels(images), strict=True)]
        return torch.cat(seen, -1).reshape(batch, -1, self.width)

    def pixels(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Each tower's pictures [B * V, 3, S, S], normalised in float32 as torchvision does."""
        x = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        normalised = []
        for tower in self.towers:
            mean, deviation = (
                torch.tensor(row, device=x.device)[:, None, None] for row in tower.config.normalisation
            )
            normalised.append(((x - mean) / deviation).to(tower.pos_embed.dtype))
        return normalised


class Projector(nn.Module):
    """Patches to words: three layers behind two towers, two behind one."""

    def __init__(self, vision: int, width: int, fused: bool) -> None:
        super().__init__()
        inside = 4 * vision if fused else width
        self.fc1, self.fc2 = nn.Linear(vision, inside), nn.Linear(inside, width)
        self.fc3 = nn.Linear(width, width) if fused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        if self.fc3 is not None:
            out = self.fc3(F.gelu(out))
        return out
