"""What a backbone hands on, and what memory enriches before the head reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Reads:
    """Which language layers a head reads beside the cognition; negative numbers count from the last one.

    Attributes:
        hidden: 0 for what enters the first layer, l for the output of the l-th, up to `num_layers`.
        keys_values: 0 for the first layer, up to `num_layers - 1`.
        continuation: what the token behind the prompt reads, but in training; for a head that writes words.
    """

    hidden: tuple[int, ...] = ()
    keys_values: tuple[int, ...] = ()
    continuation: bool = False

    def __bool__(self) -> bool:
        return bool(self.hidden or self.keys_values)

    def of(self, num_layers: int) -> Reads:
        """The same with no negative numbers. ValueError for a layer that a backbone of `num_layers` lacks."""
        counts = {"hidden": num_layers + 1, "keys_values": num_layers}
        for name, count in counts.items():
            if missing := [layer for layer in getattr(self, name) if not -count <= layer < count]:
                raise ValueError(
                    f"model.head reads {name} {missing}, and the backbone has {num_layers} language layers; "
                    f"choose among 0..{count - 1}"
                )
        known = {name: tuple(i % count for i in getattr(self, name)) for name, count in counts.items()}
        return Reads(**known, continuation=self.continuation)


@dataclass
class LayerStates:
    """The observation's N tokens inside the language layers that a head reads, in the order of its `Reads`.

    In training windows every tensor has leading axes [B, K], else [B].

    Attributes:
        hidden: [B, R, N, D], R = len(reads.hidden).
        keys, values: [B, S, N, Dk], S = len(reads.keys_values), Dk = `Backbone.cache_size`.
        valid: bool [B, N], False on padding.
    """

    hidden: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same record with `function` applied to each tensor."""
        return type(self)(*(function(x) for x in self._tensors))

    def padded(self, tokens: int) -> Self:
        """With padding at the end, up to N = `tokens`."""
        more = tokens - self.valid.shape[-1]
        hidden, keys, values = (F.pad(x, (0, 0, 0, more)) for x in (self.hidden, self.keys, self.values))
        return type(self)(hidden, keys, values, F.pad(self.valid, (0, more)))

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.hidden, self.keys, self.values, self.valid


@dataclass
class Continuation:
    """What the token behind each of B prompts reads: keys and values of S tokens, a memory's among them.

    Attributes:
        keys, values: of each language layer, [B, key heads, S, size of a head].
        bias: [B, 1 or heads, S], added to the attention scores; the dtype's least number hides an entry.
        position: int64 [B], of the next token.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    bias: torch.Tensor
    position: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same record with `function` applied to each tensor."""
        keys, values = (tuple(map(function, each)) for each in (self.keys, self.values))
        return type(self)(keys, values, function(self.bias), function(self.position))

    def padded(self, tokens: int) -> Self:
        """With hidden entries at the end, up to S = `tokens`."""
        more = tokens - self.bias.shape[-1]
        keys, values = (tuple(F.pad(x, (0, 0, 0, more)) for x in each) for each in (self.keys, self.values))
        bias = F.pad(self.bias, (0, more), value=torch.finfo(self.bias.dtype).min)
        return type(self)(keys, values, bias, self.position)

    def with_rows(self, rows: torch.Tensor, other: Self) -> Self:
        """[B, ...] with rows int64 [b] replaced by those of `other` [b, ...]."""
        tokens = max(self.bias.shape[-1], other.bias.shape[-1])
        own, new = self.padded(tokens), other.padded(tokens)
        keys, values = (
            tuple(x.index_copy(0, rows, y) for x, y in zip(*each, strict=True))
            for each in ((own.keys, new.keys), (own.values, new.values))
        )
        bias, position = own.bias.index_copy(0, rows, new.bias), own.position.index_copy(0, rows, new.position)
        return type(self)(keys, values, bias, position)


@dataclass
class Features:
    """One observation's features. In training windows every tensor has leading axes [B, K], else [B].

    The first two kinds follow MemoryVLA (arXiv 2508.19236): what the model makes of the scene, and what it sees.

    Attributes:
        cognition: [B, D], the last hidden state of the prompt's last token. Memory enriches this and nothing else:
            a head that reads `layers` reads the cognition as well, or it knows nothing of the past.
        perception: [B, N, Dp], visual tokens before the language layers.
        proprio: [B, P], the normalised proprioception, for heads that need it exactly.
        layers: what the head reads of the language layers (`HeadConfig.reads`); None for a head that reads none.
        continuation: for a head that writes words, but in training; else None.
    """

    cognition: torch.Tensor
    perception: torch.Tensor
    proprio: torch.Tensor
    layers: LayerStates | None = None
    continuation: Continuation | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same record with `function` applied to each tensor."""
        layers, going_on = (part and part.map(function) for part in (self.layers, self.continuation))
        read = (function(self.cognition), function(self.perception), function(self.proprio))
        return type(self)(*read, layers, going_on)  # type: ignore[arg-type]

    def at(self, k: int) -> Self:
        """The window's step `k`: [B, K, ...] -> [B, ...]."""
        return self.map(lambda x: x[:, k])

    def with_cognition(self, cognition: torch.Tensor) -> Self:
        return replace(self, cognition=cognition)

    def with_rows(self, rows: torch.Tensor, other: Self) -> Self:
        """[B, ...] with rows int64 [b] replaced by those of `other` [b, ...], however many tokens it has."""
        layers = self.layers
        if layers is not None and other.layers is not None:
            tokens = max(layers.valid.shape[-1], other.layers.valid.shape[-1])
            own, new = layers.padded(tokens)._tensors, other.layers.padded(tokens)._tensors
            layers = LayerStates(*(x.index_copy(0, rows, y) for x, y in zip(own, new, strict=True)))
        going_on = self.continuation
        if going_on is not None and other.continuation is not None:
            going_on = going_on.with_rows(rows, other.continuation)
        return type(self)(
            self.cognition.index_copy(0, rows, other.cognition),
            self.perception.index_copy(0, rows, other.perception),
            self.proprio.index_copy(0, rows, other.proprio),
            layers,
            going_on,
        )


def stacked(steps: Sequence[LayerStates | None]) -> LayerStates | None:
    """A window's K steps [B, ...] as [B, K, ...]; None if there are none."""
    if any(step is None for step in steps):
        return None
    tensors = zip(*(step._tensors for step in steps if step is not None), strict=True)
    return LayerStates(*(torch.stack(each, 1) for each in tensors))
