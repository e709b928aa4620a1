"""GPUs by their rated numbers, from their makers' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

GIB: Final = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        gib: memory.
        dtype: what weights and products are stored and computed in.
        tflops: of dense matrix products in that dtype, summed in float32; None if unknown.
        gb_per_s: of its memory; None if unknown.
    """

    name: str
    gib: float
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    tflops: float | None = None
    gb_per_s: float | None = None


#: By the name in small letters.
CARDS: Final[Mapping[str, Card]] = {
    "4090": Card("RTX 4090", 24, "bfloat16", 165, 1008),
    "v100": Card("V100 32 GB", 32, "float16", 125, 900),
    "a100": Card("A100 80 GB", 80, "bfloat16", 312, 2039),
    "h100": Card("H100 80 GB", 80, "bfloat16", 989, 3350),
    "h200": Card("H200 141 GB", 141e9 / GIB, "bfloat16", 989, 4800),
}


def card_named(name: str) -> Card:
    """A card, or one of so many GB of which nothing else is known. ValueError if it is neither."""
    found = CARDS.get(name.lower())
    if found is not None:
        return found
    try:
        gib = float(name)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        raise ValueError(f"gpu is {name!r}; give its memory in GB, or one of {', '.join(CARDS)}")
    return Card(f"{gib:g} GB", gib)
