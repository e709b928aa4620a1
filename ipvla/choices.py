"""What was meant by a name that nothing has: the hint that ends an error's message, the same in every room."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], most: int = 1, likeness: float = 0.5) -> list[str]:
    """At most `most` of the known names that are like `name`, the likest first.

    Args:
        likeness: the least, in [0, 1]; 1 is equal.
    """
    return difflib.get_close_matches(name, list(known), most, likeness)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing sentence: the nearest known name, or all of them."""
    known = list(known)
    if close := nearest(name, known):
        return f"did you mean {close[0]!r}?"
    return f"choose one of: {', '.join(known)}" if known else "there is none to choose"
