"""The perceptual-cognitive memory bank of MemoryVLA (arXiv 2508.19236, section 3.3).

Two banks work alike: one keeps the cognition, n = 1 token of D, the other the perception, squeezed to n tokens of
size d. Each holds up to L entries m_i [n, d], written at control steps t_i. Per policy step, for the present
tokens x [n, d]:

    retrieve     h = x through two pre-norm transformer layers: h += A(norm(h), M), h += FFN(norm(h)), where
                 A is single-head cross-attention over all tokens of all entries,
                 keys W_k (norm(m_i) + TE(t_i)), values W_v norm(m_i)
    gate         g = sigmoid(W [x; h]), W drawn with standard deviation 1e-3, so that g starts at 1/2
    fuse         x' = g * x + (1 - g) * h;  x' = x, untouched, while the bank is empty
    write        x' is appended with the control step t
    consolidate  beyond L entries, the adjacent pair with the highest mean per-token cosine similarity becomes its
                 mean at the earlier t; with `fifo` the oldest entry is dropped instead

    cognition' = x'_cognition + W_p (x'_perception - x_perception), W_p zero at first

TE is the sinusoidal encoding of control steps since the reset, in training and in rollout alike. Entries are
normalised for reading, which keeps what is stored, read and stored again bounded. They stay in the graph, so
gradients flow through what was stored within the window.

Memory: cognition float32 [B, L, 1, D], perception float32 [B, L, n, d], their timesteps int64 [B, L], count int64
[B]; a bank is filled from its end, so that its last `count` entries are real and in order of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, silence
from ipvla.models.memory.squeeze import SqueezingMemory, TimestepEncoding
from ipvla.types import Memory


@MemoryConfig.register_subclass("bank")
@dataclass(frozen=True)
class BankMemoryConfig(MemoryConfig):
    """Sizes of the banks.

    Attributes:
        length: L, entries that a bank holds.
        consolidation: "merge" the most similar adjacent pair, or drop the oldest entry ("fifo").
        tokens, token_width: n and d of the perceptual bank.
        attention, hidden: inner sizes of the retrieval's attention and of its feed-forward network.
    """

    length: int = 16
    consolidation: str = "merge"
    tokens: int = 4
    token_width: int = 32
    attention: int = 32
    hidden: int = 32

    def __post_init__(self) -> None:
        for name in ("length", "tokens", "token_width", "attention", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; it must be at least 1")
        if self.consolidation not in ("merge", "fifo"):
            raise ValueError(f'memory.consolidation is {self.consolidation!r}; choose "merge" or "fifo"')

    def build(self, backbone: Backbone) -> BankMemory:
        return BankMemory(self, backbone.width, backbone.perception_size)


def most_similar_pair(entries: torch.Tensor) -> torch.Tensor:
    """Of entries [B, M, n, d], M >= 2: int64 [B], i of the pair (i, i + 1) most alike; the earliest of equals."""
    unit = F.normalize(entries.detach(), dim=-1)
    return (unit[:, :-1] * unit[:, 1:]).sum(-1).mean(-1).argmax(1)


def append(
    entries: torch.Tensor, times: torch.Tensor, full: torch.Tensor, x: torch.Tensor, t: torch.Tensor, merge: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries [B, L, n, d] and times [B, L] with x [B, n, d] of control step t [B] written at the end.

    Room is made where `full` bool [B] by merging the most similar adjacent pair, else (or if not `merge`) by
    dropping the first entry, which is an empty one while the bank is not full.
    """
    entries = torch.cat([entries, x[:, None]], 1)
    times = torch.cat([times, t[:, None]], 1)
    if not merge:
        return entries[:, 1:], times[:, 1:]
    pair = torch.where(full, most_similar_pair(entries), -1)[:, None]
    place = torch.arange(times.shape[1] - 1, device=t.device)
    later = (place > pair).float() + 0.5 * (place == pair)  # the share of entry i + 1 in the new entry i
    merged = torch.lerp(entries[:, :-1], entries[:, 1:], later[..., None, None])
    return merged, torch.where(place > pair, times[:, 1:], times[:, :-1])


class Retrieval(nn.Module):
    """One layer of the retrieval: single-head cross-attention, then a feed-forward network, both pre-norm."""

    def __init__(self, width: int, attention: int, hidden: int) -> None:
        super().__init__()
        self.scale = attention**-0.5
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query = nn.Linear(width, attention, bias=False)
        self.out = nn.Linear(attention, width, bias=False)
        self.feed_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """x [B, n, d], keys and values [B, M, a], bias [B, 1, M] added to the scores -> [B, n, d]."""
        query = self.query(self.attention_norm(x))
        score = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=self.scale)
        x = x + self.out(score.softmax(-1) @ values)
        out: torch.Tensor = x + self.feed(self.feed_norm(x))
        return out


class Bank(nn.Module):
    """One bank's weights: retrieval and gate for tokens of size `width`; see the module's docstring."""

    def __init__(self, config: BankMemoryConfig, width: int, layers: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.encoding = TimestepEncoding(width)
        self.layers = nn.ModuleList(Retrieval(width, config.attention, config.hidden) for _ in range(layers))
        self.keys = nn.Linear(
            width, layers * config.attention, bias=False
        )  # all layers' at once: fewer, larger products
        self.values = nn.Linear(width, layers * config.attention, bias=False)
        self.gate = nn.Linear(2 * width, width)
        nn.init.normal_(self.gate.weight, std=1e-3)
        nn.init.zeros_(self.gate.bias)

    def forward(
        self, x: torch.Tensor, entries: torch.Tensor, times: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        """x [B, n, d] fused with what entries [B, L, n, d] of control steps times [B, L] hold."""
        length, tokens = entries.shape[1:3]
        stored = self.norm(entries)
        keys = self.keys((stored + self.encoding(times)[:, :, None]).flatten(1, 2))
        values = self.values(stored.flatten(1, 2))
        empty = torch.arange(length, device=count.device) < length - count[:, None]
        bias = (empty * -1e9)[:, None].repeat_interleave(tokens, -1)
        retrieved = x
        per_layer = zip(keys.chunk(len(self.layers), -1), values.chunk(len(self.layers), -1), strict=True)
        for layer, (key, value) in zip(self.layers, per_layer, strict=True):
            retrieved = layer(retrieved, key, value, bias)
        gate = torch.sigmoid(self.gate(torch.cat([x, retrieved], -1)))
        return torch.where((count > 0)[:, None, None], torch.lerp(retrieved, x, gate), x)


class BankMemory(SqueezingMemory):
    """See the module's docstring."""

    def __init__(self, config: BankMemoryConfig, width: int, perception: int) -> None:
        super().__init__(perception, config.tokens, config.token_width)
        self.config = config
        self.width = width
        self.cognition = Bank(config, width)
        self.perception = Bank(config, config.token_width)
        self.out = nn.Linear(config.tokens * config.token_width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def initial(self, batch: int) -> Memory:
        c, like = self.config, self.out.weight
        times = torch.zeros(batch, c.length, dtype=torch.long, device=like.device)
        return {
            "cognition": torch.zeros(batch, c.length, 1, self.width, device=like.device),
            "cognition_t": times,
            "perception": torch.zeros(batch, c.length, c.tokens, c.token_width, device=like.device),
            "perception_t": times.clone(),
            "count": torch.zeros(batch, dtype=torch.long, device=like.device),
        }

    def close(self) -> bool:
        for layer in (*self.cognition.layers, *self.perception.layers):
            silence(layer.out, layer.feed[-1])  # what is retrieved is then what was asked with
        return True

    def remember(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        count = memory["count"]
        length, merge = self.config.length, self.config.consolidation == "merge"
        after: Memory = {"count": (count + 1).clamp(max=length)}
        with torch.autocast(t.device.type, enabled=False):  # what is remembered stays float32
            now = {"cognition": features.cognition.float()[:, None], "perception": features.perception}
            fused = {}
            for name, bank in (("cognition", self.cognition), ("perception", self.perception)):
                entries, times = memory[name], memory[f"{name}_t"]
                fused[name] = bank(now[name], entries, times, count)
                after[name], after[f"{name}_t"] = append(entries, times, count == length, fused[name], t, merge)
            recalled = self.out((fused["perception"] - now["perception"]).flatten(1))
            return features.with_cognition(fused["cognition"][:, 0] + recalled), after
