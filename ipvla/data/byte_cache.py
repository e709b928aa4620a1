"""A least-recently-used cache that is bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Keeps the most recently used values whose sizes add up to at most `capacity` bytes; safe between threads."""

    def __init__(self, capacity: int, size: Callable[[V], int]) -> None:
        if capacity < 0:
            raise ValueError(f"cache capacity {capacity} bytes is negative; give 0 to cache nothing")
        self.capacity = capacity
        self.nbytes = 0
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value stored for `key`, else `make()`, which is then stored."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        value = make()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = value
                self.nbytes += self._size(value)
            while self.nbytes > self.capacity:
                self.nbytes -= self._size(self._entries.popitem(last=False)[1])
        return value
