"""The cache keeps what was used last, within its bound."""

from __future__ import annotations

import pytest

from ipvla.data.dataset import ByteCache


def test_the_least_recently_used_goes_first() -> None:
    cache = ByteCache[str, bytes](capacity=10, size=len)
    made: list[str] = []

    def get(key: str) -> bytes:
        return cache.get(key, lambda: made.append(key) or bytes(4))  # type: ignore[func-returns-value]

    for key in ("a", "b", "a", "c"):  # c pushes out b, because a was used since.
        get(key)
    assert (made, cache.nbytes) == (["a", "b", "c"], 8)
    get("a")
    get("b")
    assert made == ["a", "b", "c", "b"]


def test_a_value_larger_than_the_bound_is_given_but_not_kept() -> None:
    cache = ByteCache[str, bytes](capacity=10, size=len)
    assert cache.get("big", lambda: bytes(11)) == bytes(11)
    assert cache.nbytes == 0


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes is negative"):
        ByteCache[str, bytes](-1, len)
