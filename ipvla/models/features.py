"""What a backbone hands on, and what memory enriches before the head reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Reads:
    """Which language layers a head reads beside the cognition; negative numbers count from the last one.

    Attributes:
        hidden: 0 for what enters the first layer, l for the output of the l-th, up to `num_layers`; None for
            the outputs of all layers.
        keys_values: 0 for the first layer, up to `num_layers - 1`; None for all layers.
        language: the language model itself, as `Features.language`, with the keys and values of every layer.
    """

    hidden: tuple[int, ...] | None = ()
    keys_values: tuple[int, ...] | None = ()
    language: bool = False

    def __bool__(self) -> bool:
        return self.hidden != () or self.caches

    @property
    def caches(self) -> bool:
        """Are there any keys and values?"""
        return self.keys_values != () or self.language

    def of(self, num_layers: int) -> Reads:
        """The same in numbers from 0 on. ValueError for a layer that a backbone of `num_layers` lacks."""
        read = {}
        for name, count in {"hidden": num_layers + 1, "keys_values": num_layers}.items():
            asked = None if name == "keys_values" and self.language else getattr(self, name)
            layers = tuple(range(count - num_layers, count)) if asked is None else asked
            if missing := [layer for layer in layers if not -count <= layer < count]:
                raise ValueError(
                    f"model.head reads {name} {missing}, and the backbone has {num_layers} language layers; "
                    f"choose among 0..{count - 1}"
                )
            read[name] = tuple(layer % count for layer in layers)
        return Reads(**read, language=self.language)


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

    def followed(self, keys: torch.Tensor, values: torch.Tensor) -> Self:
        """[B, ...] with the keys and values [B, S, M, Dk] of M further tokens, whose hidden states are 0 here."""
        more = keys.shape[2]
        return type(self)(
            F.pad(self.hidden, (0, 0, 0, more)),
            torch.cat([self.keys, keys], 2),
            torch.cat([self.values, values], 2),
            F.pad(self.valid, (0, more), value=True),
        )

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.hidden, self.keys, self.values, self.valid


class LanguageModel(Protocol):
    """What a head needs of the language model to go on writing behind an observation; `Backbone` has it."""

    def extend(
        self, tokens: torch.Tensor, past: LayerStates, reads: torch.Tensor, keep: bool = False
    ) -> tuple[torch.Tensor, LayerStates]: ...

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor: ...

    def logits(self, states: torch.Tensor) -> torch.Tensor: ...


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
        language: the language model, where the head is called, for a head that reads it (`Reads.language`).
    """

    cognition: torch.Tensor
    perception: torch.Tensor
    proprio: torch.Tensor
    layers: LayerStates | None = None
    language: LanguageModel | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same record with `function` applied to each tensor."""
        layers = None if self.layers is None else self.layers.map(function)
        return type(self)(function(self.cognition), function(self.perception), function(self.proprio), layers)

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
        return type(self)(
            self.cognition.index_copy(0, rows, other.cognition),
            self.perception.index_copy(0, rows, other.perception),
            self.proprio.index_copy(0, rows, other.proprio),
            layers,
        )


def stacked(steps: Sequence[LayerStates | None]) -> LayerStates | None:
    """A window's K steps [B, ...] as [B, K, ...]; None if there are none."""
    if any(step is None for step in steps):
        return None
    tensors = zip(*(step._tensors for step in steps if step is not None), strict=True)
    return LayerStates(*(torch.stack(each, 1) for each in tensors))
