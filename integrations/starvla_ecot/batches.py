"""Batches of frames from several processes, in an order that timing cannot change, resumed without replay."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from integrations.starvla_ecot.frames import FrameDataset, Shard
from integrations.starvla_ecot.samples import Sample


def collate(samples: list[Sample]) -> list[Sample]:
    """A batch is the list of its samples: the model's `forward` stacks what it needs."""
    return samples


class FrameLoader(DataLoader[list[Sample]]):
    """Lists of samples; one iteration is what is left of an epoch, the next one the next epoch.

    Every frame of the rank comes once per epoch, so that the last batch of each worker may be smaller. Ranks have
    their own frames already: do not give the loader to a framework that would part it among ranks again.

    Args:
        frames: all frames of this rank.
        batch_size, num_workers: as a DataLoader's; the order depends on both.
    """

    def __init__(self, frames: FrameDataset, batch_size: int, num_workers: int) -> None:
        self.frames = frames
        self._epoch = self._position = 0
        self._batches = _Batches(frames, batch_size, max(num_workers, 1))
        start = _clean_start() if num_workers else None
        super().__init__(
            self._batches,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=collate,
            multiprocessing_context=start,
        )

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins with this epoch's first batch."""
        self._epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """All that a checkpoint needs: the next batch is the one after the last that was given."""
        c = self._batches
        return {
            "epoch": self._epoch,
            "position": self._position,
            "batch_size": c.batch_size,
            "workers": c.workers,
            "world_size": self.frames.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on from there.

        Raises:
            ValueError: the state is of another batch size or number of workers or ranks: the order differs.
        """
        ours = self.state_dict()
        for name in ("batch_size", "workers", "world_size"):
            if state[name] != ours[name]:
                raise ValueError(
                    f"the checkpoint's data were read with {name} {state[name]}, now it is {ours[name]}; resume "
                    f"with {state[name]}, or start the epoch anew with set_epoch({state['epoch']})"
                )
        self._epoch, self._position = state["epoch"], state["position"]

    def __len__(self) -> int:
        """Batches of a whole epoch, the one that comes next."""
        return sum(self._batches.counts(self._epoch))

    def __iter__(self) -> Any:
        self._batches.start = (self._epoch, self._position)  # workers are started with a copy
        for batch in super().__iter__():
            self._position += 1
            if batch:
                yield batch
        self.set_epoch(self._epoch + 1)


def _clean_start() -> BaseContext:
    """Workers are forked from a small process: forks of one that had read array_record have crashed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Batches(IterableDataset[list[Sample]]):
    """One worker's batches, then empty ones until the worker with most of them is done.

    With as many from each, the loader takes them strictly in turn; where one ran dry earlier, the order of the
    rest would depend on when that was noticed.
    """

    def __init__(self, frames: FrameDataset, batch_size: int, workers: int) -> None:
        self.frames, self.batch_size, self.workers = frames, batch_size, workers
        self.start = (0, 0)

    def counts(self, epoch: int) -> list[int]:
        """Batches of each worker."""
        return [-(-self.frames.count(epoch, self._shard(i)) // self.batch_size) for i in range(self.workers)]

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, position = self.start
        worker = get_worker_info()
        # The loader asks worker 0 first: after a resume it plays the part of the one whose turn it was.
        part = ((worker.id if worker else 0) + position) % self.workers
        done = -(-(position - part) // self.workers)
        counts = self.counts(epoch)
        skip = min(done * self.batch_size, self.frames.count(epoch, self._shard(part)))
        samples = self.frames.samples(epoch, self._shard(part, skip))
        for _ in range(done, max(counts)):
            yield list(itertools.islice(samples, self.batch_size))

    def _shard(self, part: int, skip: int = 0) -> Shard:
        return Shard(self.frames.rank * self.workers + part, self.frames.world_size * self.workers, skip)
