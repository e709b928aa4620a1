"""Pictures into a square without changing their aspect, as LeRobot's policies were trained on them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F


def letterboxed(pictures: torch.Tensor, size: int, place: Literal["centre", "corner"] = "centre") -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, size, size] in [-1, 1], black where there is no picture.

    Bilinear without antialiasing, on float values. openpi's server uses antialiasing, which moves a pixel by up to
    0.3; a picture that has the right size already is the same in both.

    Args:
        place: "centre" for pi0 and pi0.5; "corner" for SmolVLA, whose pictures stand at the bottom and the right.
    """
    x = pictures.permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[2:]
    if (height, width) != (size, size):
        ratio = max(height / size, width / size)
        height, width = int(height / ratio), int(width / ratio)
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False).clamp(0, 1)
        up, left = size - height, size - width
        if place == "centre":
            up, left = up // 2, left // 2
        x = F.pad(x, (left, size - width - left, up, size - height - up))
    return x * 2 - 1
