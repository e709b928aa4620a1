"""Which job an idle worker takes next: one of the group that it knows, else of the group with the most waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class AffinityQueue(Generic[Job]):
    """Jobs in groups (episodes by task); within a group they leave in the order in which they came."""

    def __init__(self, jobs: Iterable[Job], group: Callable[[Job], str]) -> None:
        self._group = group
        self._queues: dict[str, deque[Job]] = {}
        for job in jobs:
            self._queues.setdefault(group(job), deque()).append(job)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def take(self, known: str | None) -> Job:
        """The next job for a worker whose last job was of group `known`. Raises IndexError if none waits."""
        if not self:
            raise IndexError("no job waits")
        if known is None or not self._queues.get(known):
            known = max(self._queues, key=lambda name: len(self._queues[name]))
        return self._queues[known].popleft()

    def put_back(self, job: Job) -> None:
        """To the front of its group."""
        self._queues[self._group(job)].appendleft(job)
