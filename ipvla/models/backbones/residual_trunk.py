"""A visual trunk for textured scenes: residual blocks that the instruction modulates, and their keypoints.

`TinyTrunk` sees 8 pixels at a time: enough for coloured shapes, not for objects. Here blocks at stride 8 widen
that by 32 pixels each. The condition modulates them (FiLM, Perez et al., arXiv 1709.07871); a spatial softmax per
channel says where things are (Levine et al., arXiv 1504.00702), and a read-out under its weights what is there.
Group normalisation keeps maps varied in space, without which keypoints stand still and nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

#: Cells [B, V * h * w, C] -> the same with what points say of them.
Fuse: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class FilmBlock(nn.Module):
    """relu(x + norm(conv(relu(film(norm(conv(x))))))), maps [N, C, h, w] and condition [N, D]."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels)
        self.film = nn.Linear(condition, 2 * channels)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(condition)[..., None, None].chunk(2, 1)
        y = F.relu(self.norm1(self.conv1(x)) * (1 + scale) + shift)
        out: torch.Tensor = F.relu(x + self.norm2(self.conv2(y)))
        return out


class ResidualTrunk(nn.Module):
    """Images [B, V, H, W, 3], condition [B, D] -> map [B, V * h * w, C + 2] and its keypoints [B, V * C * 3].

    h = H / 8, rounded up. The last two channels of the map are the cell's coordinates in [-1, 1]. A keypoint is
    x, y and a reading there.
    """

    grid: torch.Tensor

    def __init__(self, image_size: int, num_views: int, channels: int, blocks: int, condition: int) -> None:
        super().__init__()
        half = channels // 2
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, half, 5, 2, 2), nn.GroupNorm(4, half), nn.ReLU()),
            *(nn.Conv2d(half, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.ReLU()),
        )
        self.views = nn.Parameter(torch.randn(num_views, condition) * 0.3)
        self.blocks = nn.ModuleList(FilmBlock(channels, condition) for _ in range(blocks))
        # linear along the channels, so that adapters and their statistics know them as any linear layer
        self.where, self.what = nn.Linear(channels, channels), nn.Linear(channels, channels)
        nn.init.normal_(self.where.weight, std=3 * channels**-0.5)  # else a keypoint is everywhere, hence nowhere
        side = -(-image_size // 8)
        line = (torch.arange(side) + 0.5) * 2 / side - 1
        grid = torch.stack([line[None].expand(side, side), line[:, None].expand(side, side)], -1)
        self.register_buffer("grid", grid.reshape(side * side, 2))

    def calibrate(self, mean_image: torch.Tensor) -> None:
        """Nothing: pictures are centred on grey, since a moving camera has no mean picture."""

    def forward(
        self, images: torch.Tensor, condition: torch.Tensor, fuse: Fuse | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b, v = images.shape[:2]
        x = images.flatten(0, 1).permute(0, 3, 1, 2)
        x = ((x - 127.5) / 64).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        if fuse is not None:
            cells = fuse(x.flatten(2).transpose(1, 2).reshape(b, -1, x.shape[1]))
            x = cells.reshape(b * v, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        by_view = (condition[:, None] + self.views.to(condition.dtype)).flatten(0, 1)
        for block in self.blocks:
            x = block(x, by_view)
        cells = x.flatten(2).transpose(1, 2)
        weight = self.where(cells).float().softmax(1)
        place = weight.transpose(1, 2) @ self.grid
        seen = (weight * self.what(cells)).sum(1)[..., None]
        cells = cells.reshape(b, -1, cells.shape[-1])
        perception = torch.cat([cells, self.grid.to(x.dtype).repeat(b, v, 1)], -1)
        return perception, torch.cat([place, seen], -1).reshape(b, -1)
