"""Where in its episode each step of a training window lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Segments:
    """A window's steps, told apart by episode, so that a mechanism can read them all at once.

    Attributes:
        step: int64 [B, K], policy steps of the episode before this one.
        episode: int64 [B, K], 0 for the episode that the memory came with, one more at each start; -1 on an
            idle step that claims a start, which sees nothing and leaves no trace.
        after: int64 [B], policy steps of the last episode when the window is over.
    """

    step: torch.Tensor
    episode: torch.Tensor
    after: torch.Tensor

    @classmethod
    def of(cls, count: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor) -> Self:
        """From count int64 [B], the policy steps before the window, and is_first, valid bool [B, K]."""
        starts = is_first & valid
        episode = starts.cumsum(1)
        through = valid.cumsum(1)
        before = through - valid.long()
        origin = torch.where(starts, before, 0).cummax(1).values
        origin = torch.where(episode == 0, -count[:, None], origin)
        return cls(
            step=torch.where(is_first, 0, before - origin),
            episode=torch.where(is_first & ~valid, -1, episode),
            after=through[:, -1] - origin[:, -1],
        )
