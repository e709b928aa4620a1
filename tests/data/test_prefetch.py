"""Prefetching changes when items are made, not which."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ipvla.data.lanes import prefetch


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within 10 s"
        time.sleep(0.01)


def test_all_items_in_order() -> None:
    assert list(prefetch(range(100))) == list(range(100))


def test_it_works_ahead_but_only_so_far() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in itertools.count():
            made.append(i)
            yield i

    stream = prefetch(items(), depth=2)
    assert next(stream) == 0
    _wait_until(lambda: len(made) >= 4)
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]  # one handed over, two ready, one waiting for a place
    stream.close()


def test_an_exception_arrives_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    stream = prefetch(itertools.count())
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
