"""The last W observations, read by attention: the baseline that papers on memory compare with.

The memory stores every `stride`-th of an episode's policy steps (0, s, 2s, ...), the last W of them: the entry
e_j = [z_j; p_j] is the cognition z [D] beside the squeezed perception p [n * d], as the backbone gave them, with
its control step t_j. For the present observation, at control step t, with H heads of size a / H:

    score_j = (W_q norm(z)) . (W_k norm(e_j) + W_r TE(t - t_j)) / sqrt(a / H)
    z' = z + W_o softmax(score) (W_v norm(e))                           z' = z while there is no entry

Relative timestep encoding after Transformer-XL (arXiv 1901.02860), in control steps. Entries are raw features, not
enriched ones: nothing older than the window can act on the present, and gradients reach back as far as the window.
It follows that a training window needs no loop: `scan` attends within it at once and equals `step` after `step`.
An episode that is shorter than the window leaves it partly empty; the empty places are never read.

Memory: entries float32 [B, W, D + n * d] and their timesteps int64 [B, W], filled from the end, and count int64
[B], the episode's policy steps so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule, Segments, silence
from ipvla.models.memory.squeeze import Squeeze, TimestepEncoding
from ipvla.types import Memory


@MemoryConfig.register_subclass("window")
@dataclass(frozen=True)
class WindowMemoryConfig(MemoryConfig):
    """Sizes of the window.

    Attributes:
        length: W, stored observations.
        stride: policy steps from one stored observation to the next.
        tokens, token_width: n and d of the squeezed perception.
        attention, heads: a, inner size of the attention, a multiple of its heads.
    """

    length: int = 16
    stride: int = 1
    tokens: int = 4
    token_width: int = 32
    attention: int = 128
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("length", "stride", "tokens", "token_width", "attention", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; it must be at least 1")
        if self.attention % self.heads:
            raise ValueError(f"memory.attention {self.attention} is not a multiple of memory.heads {self.heads}")

    def build(self, backbone: Backbone) -> WindowMemory:
        return WindowMemory(self, backbone.width, backbone.perception_size)


class WindowMemory(MemoryModule):
    """See the module's docstring."""

    def __init__(self, config: WindowMemoryConfig, width: int, perception: int, timestep: int = 32) -> None:
        super().__init__()
        self.config = config
        self.entry_width = width + config.tokens * config.token_width
        self.squeeze = Squeeze(perception, config.tokens, config.token_width)
        self.norm = nn.LayerNorm(width)
        self.entry_norm = nn.LayerNorm(self.entry_width)
        self.query = nn.Linear(width, config.attention)
        self.key = nn.Linear(self.entry_width, config.attention, bias=False)
        self.encoding = TimestepEncoding(timestep)
        self.age = nn.Linear(timestep, config.attention, bias=False)
        self.value = nn.Linear(self.entry_width, config.attention)
        self.out = nn.Linear(config.attention, width, bias=False)

    def initial(self, batch: int) -> Memory:
        length, device = self.config.length, self.out.weight.device
        return {
            "entries": torch.zeros(batch, length, self.entry_width, device=device),
            "entries_t": torch.zeros(batch, length, dtype=torch.long, device=device),
            "count": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def close(self) -> bool:
        silence(self.out)
        return True

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        entry = self._entry(features)
        entries, times, count = memory["entries"], memory["entries_t"], memory["count"]
        read = self._read(features.cognition[:, None], t[:, None], entries, times, self._filled(count)[:, None])
        keep = count % self.config.stride == 0
        return features.with_cognition(features.cognition + read[:, 0]), {
            "entries": torch.where(keep[:, None, None], torch.cat([entries[:, 1:], entry[:, None]], 1), entries),
            "entries_t": torch.where(keep[:, None], torch.cat([times[:, 1:], t[:, None]], 1), times),
            "count": count + 1,
        }

    def scan(
        self, features: Features, memory: Memory, t: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor
    ) -> tuple[Features, Memory]:
        """The whole window at once: each step attends to the memory's entries and to stored steps before it."""
        length = self.config.length
        at = Segments.of(memory["count"], is_first, valid)
        entries = torch.cat([memory["entries"], self._entry(features)], 1)
        times = torch.cat([memory["entries_t"], t], 1)
        stored = torch.cat([self._filled(memory["count"]), valid & (at.step % self.config.stride == 0)], 1)
        episode = torch.cat([torch.zeros_like(memory["entries_t"]), at.episode], 1)
        # the number of each stored entry; an entry is in the window of a step while fewer than W follow it
        number = stored.cumsum(1)
        before = number[:, length - 1 : -1]
        allowed = (
            stored[:, None]
            & (episode[:, None] == at.episode[..., None])
            & (number[:, None] <= before[..., None])
            & (before[..., None] - number[:, None] < length)
        )
        read = self._read(features.cognition, t, entries, times, allowed)
        last = stored & (episode == episode.amax(1, keepdim=True))
        place = torch.where(last, torch.arange(last.shape[1], device=t.device), -1)
        place = place.topk(length).values.flip(1)
        real, place = place >= 0, place.clamp(min=0)
        held = entries.gather(1, place[..., None].expand(-1, -1, self.entry_width))
        return features.with_cognition(features.cognition + read), {
            "entries": torch.where(real[..., None], held, 0),
            "entries_t": torch.where(real, times.gather(1, place), 0),
            "count": at.after,
        }

    def _entry(self, features: Features) -> torch.Tensor:
        """float32 [..., D + n * d] of features [..., D] and [..., N, Dp]."""
        return torch.cat([features.cognition.float(), self.squeeze(features.perception).flatten(-2)], -1)

    def _filled(self, count: torch.Tensor) -> torch.Tensor:
        """bool [B, W]: places that hold an entry after `count` policy steps."""
        length, stride = self.config.length, self.config.stride
        return torch.arange(length, device=count.device) >= length - (count[:, None] + stride - 1) // stride

    def _read(
        self,
        cognition: torch.Tensor,
        t: torch.Tensor,
        entries: torch.Tensor,
        times: torch.Tensor,
        allowed: torch.Tensor,
    ) -> torch.Tensor:
        """What cognition [B, K, D] at t [B, K] reads from M entries where allowed [B, K, M]: [B, K, D]."""
        heads, size = self.config.heads, self.config.attention // self.config.heads
        with torch.autocast(t.device.type, enabled=False):  # what is remembered stays float32
            entries = self.entry_norm(entries)
            query = self.query(self.norm(cognition.float())).unflatten(-1, (heads, size)) * size**-0.5
            key, value = (w(entries).unflatten(-1, (heads, size)) for w in (self.key, self.value))
            age = self.encoding(t[..., None] - times[:, None])
            of_age = torch.einsum("bkha,hae->bkhe", query, self.age.weight.view(heads, size, -1))
            score = torch.einsum("bkha,bmha->bkhm", query, key) + of_age @ age.transpose(-1, -2)
            weight = score.masked_fill(~allowed[:, :, None], -1e9).softmax(-1)
            weight = weight * allowed.any(-1)[..., None, None]  # no entry, nothing read
            read: torch.Tensor = self.out(torch.einsum("bkhm,bmha->bkha", weight, value).flatten(2))
            return read
