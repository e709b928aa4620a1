"""Points in the eyes of a policy: visual tokens that know where in the world their patches are.

A token v_i [D] of a patch gets what its point p_i [3] says, behind a gate that is closed at first:
v_i + tanh(g) f_i, g = 0 [D], so that a policy begins as the one without. `grid`: f_i = e(p_i), as in LLaVA-3D and
SpatialVLA's Ego3D. `attend`: f_i is read from the points of all views near p_i: attention with the bias
-|p_i - p_j|^2 / (2 s^2), s learned per head. `global`: f_i = W [v_i; mean_j e(p_j)], one and the same vector for
all tokens, as a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import draccus
import torch
import torch.nn.functional as F
from torch import nn

#: Frequencies 2^0 .. 2^7 per metre of the encoding (SpatialVLA's Ego3D).
_FREQUENCIES: Final = 8
#: s at the start, metres: a few patches of a table top.
_NEAR_M: Final = 0.1
#: The lowest bias of a point that may be read; three times as much is a number in float16, too.
_FAR: Final = -1e4


@dataclass(frozen=True)
class FusionConfig(draccus.ChoiceRegistry):
    """A choice by `type`: how points reach visual tokens."""

    @property
    def reads(self) -> bool:
        """Does it read points, so that observations must have geometry?"""
        return True

    def build(self, width: int) -> Fusion | None:
        """For tokens of this width; None for nothing."""
        raise NotImplementedError


@FusionConfig.register_subclass("none")
@dataclass(frozen=True)
class NoFusionConfig(FusionConfig):
    """Pictures alone. Has no settings."""

    @property
    def reads(self) -> bool:
        return False

    def build(self, width: int) -> None:
        return None


@dataclass(frozen=True)
class PointFusionConfig(FusionConfig):
    """What all kinds have.

    Attributes:
        hidden: width of the layer between a point's encoding and its feature.
    """

    hidden: int = 64

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"model.fusion.hidden is {self.hidden}; it must be at least 1")


@FusionConfig.register_subclass("global")
@dataclass(frozen=True)
class GlobalFusionConfig(PointFusionConfig):
    """All tokens get the mean of all points' features: a baseline, which knows no places."""

    def build(self, width: int) -> Fusion:
        return GlobalFusion(width, self.hidden)


@FusionConfig.register_subclass("grid")
@dataclass(frozen=True)
class GridFusionConfig(PointFusionConfig):
    """Each token gets the feature of its own patch's point."""

    def build(self, width: int) -> Fusion:
        return GridFusion(width, self.hidden)


@FusionConfig.register_subclass("attend")
@dataclass(frozen=True)
class AttendFusionConfig(PointFusionConfig):
    """Each token reads the points of all views, near ones most.

    Attributes:
        heads: of the attention; they must divide the tokens' width.
    """

    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"model.fusion.heads is {self.heads}; it must be at least 1")

    def build(self, width: int) -> Fusion:
        """ValueError if the heads do not divide the width."""
        if width % self.heads:
            raise ValueError(
                f"model.fusion.heads is {self.heads}, and visual tokens have {width} numbers; give a divisor"
            )
        return AttendFusion(width, self.hidden, self.heads)


class Fusion(nn.Module):
    """See the module's docstring. A patch with an unknown point (NaN) adds nothing and is read by nobody.

    Args:
        width: D of the tokens.
        hidden: of the layer between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Linear(3 + 6 * _FREQUENCIES, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width)
        )
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, D] that know of points.

        Args:
            points: float32 [B, N, 3] in metres, each token's own, all views one after the other; NaN for unknown.

        Raises:
            ValueError: there are not as many points as tokens.
        """
        if points.shape != (*tokens.shape[:2], 3):
            raise ValueError(
                f"there are {points.shape[1]} points for {tokens.shape[1]} visual tokens; model.fusion takes one "
                "each: the pictures of training and rollout must have the size that the backbone was built for"
            )
        valid = points.isfinite().all(-1)
        places = torch.where(valid[..., None], points.float(), 0)
        features = self.points(encoded(places))
        read = self.read(tokens.to(self.gate.dtype), places, features, valid)
        return tokens + (self.gate.tanh() * read).to(tokens.dtype)

    def read(
        self, tokens: torch.Tensor, places: torch.Tensor, features: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """What each token gets [B, N, D].

        Args:
            places: float32 [B, N, 3], 0 where unknown.
            features: [B, N, D], of the points.
            valid: bool [B, N], False where the point is unknown.
        """
        raise NotImplementedError


class GridFusion(Fusion):
    """See the module's docstring."""

    def read(
        self, tokens: torch.Tensor, places: torch.Tensor, features: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        return features * valid[..., None]


class GlobalFusion(Fusion):
    """See the module's docstring."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.mix = nn.Linear(2 * width, width)

    def read(
        self, tokens: torch.Tensor, places: torch.Tensor, features: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        count = valid.sum(1, keepdim=True).clamp(min=1)[..., None]
        mean = (features * valid[..., None]).sum(1, keepdim=True) / count
        mixed: torch.Tensor = self.mix(torch.cat([tokens, mean.expand_as(tokens).to(tokens.dtype)], -1))
        return mixed


class AttendFusion(Fusion):
    """See the module's docstring."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__(width, hidden)
        self._heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.log_scale = nn.Parameter(torch.full((heads,), _NEAR_M).log())

    def read(
        self, tokens: torch.Tensor, places: torch.Tensor, features: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        features = features.to(tokens.dtype)
        q, k, v = self._split(self.query(tokens + features)), self._split(self.key(features)), self.value(features)
        near = -(places[:, :, None] - places[:, None]).square().sum(-1)[:, None]
        bias = (near / (2 * (2 * self.log_scale).exp())[:, None, None]).clamp(min=_FAR)
        # finite, so that a token that may read no point has no NaN
        bias = bias.masked_fill(~valid[:, None, None], 3 * _FAR)
        read = F.scaled_dot_product_attention(q, k, self._split(v), bias.to(q.dtype))
        mixed: torch.Tensor = self.out(read.transpose(1, 2).flatten(2))
        return mixed * valid[..., None]

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self._heads, -1).transpose(1, 2)


def encoded(places: torch.Tensor) -> torch.Tensor:
    """Places float32 [..., 3] in metres as [..., 51]: of each axis x, then sin(2^k x), then cos(2^k x), k < 8.

    The order is that of SpatialVLA's Ego3D position encoding.
    """
    x = places[..., None]
    angles = x * 2.0 ** torch.arange(_FREQUENCIES, device=places.device)
    return torch.cat([x, angles.sin(), angles.cos()], -1).flatten(-2)
