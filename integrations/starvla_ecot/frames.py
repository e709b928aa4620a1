"""A dataset as frames in random order, each once per epoch; `ipvla.data.lanes` has the episodic view."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info

from integrations.starvla_ecot.config import EcotConfig, Parallel
from integrations.starvla_ecot.samples import EpisodeNumbers, Frame, Sample, SampleMaker, views
from ipvla.data.mixtures import Mixture
from ipvla.data.reasoning.store import ReasoningStore, along
from ipvla.data.source import DatasetError, EpisodeSource
from ipvla.data.standards import Standard
from ipvla.data.statistics import Statistics
from ipvla.data.survey import Survey

#: Samples that are in the making ahead of the one that is given, per thread.
_AHEAD = 2
_MOST_THREADS = 16


IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Visit:
    """One episode's turn in an epoch; `copy` tells apart several turns of an episode with a weight above 1."""

    dataset: int
    episode: int
    copy: int = 0


@dataclass(frozen=True)
class Member:
    """One dataset of the mix.

    Attributes:
        name: under which the mix and the statistics know it.
        source: its episodes as they lie on disk.
        standard: how they become robot episodes.
        survey: of both; broken episodes are left out, and those without an instruction, as OpenVLA does.
        statistics: of the split that is trained on.
        reasoning: of its episodes, None for none.
        weight: how often an episode comes in one epoch, in the mean.
    """

    name: str
    source: EpisodeSource
    standard: Standard
    survey: Survey
    statistics: Statistics
    reasoning: ReasoningStore | None = None
    weight: float = 1.0

    @cached_property
    def lengths(self) -> IntArray:
        """int64 [E], steps per episode; 0 for one that is left out."""
        return np.where(self.survey.labelled, self.survey.lengths, 0)

    def frames(self, visit: Visit) -> list[Frame]:
        """All frames of one episode, pictures encoded. BrokenEpisodeError if it cannot be read."""
        trajectory = self.source.trajectory(visit.episode)
        episode = self.standard.episode(trajectory)
        if len(episode) != self.lengths[visit.episode]:
            raise DatasetError(
                f"{trajectory.where} has {len(episode)} steps after its standard and had "
                f"{self.lengths[visit.episode]} before: the dataset has changed; delete its survey in the cache"
            )
        said = self.reasoning.of(trajectory.metadata) if self.reasoning is not None else {}
        state = self.statistics.proprio.normalise(episode.state) if episode.state.shape[1] else None
        numbers = EpisodeNumbers(
            episode.instruction,
            self.statistics.action.normalise(episode.action),
            state,
            self.standard.absolute,
        )
        steps = zip(episode.raw_step.tolist(), along(said, episode.raw_step), strict=True)
        key = (visit.dataset, visit.episode, visit.copy)
        return [
            Frame(numbers, t, views(episode.pictures, raw), parts, (*key, raw))
            for t, (raw, parts) in enumerate(steps)
        ]


@dataclass(frozen=True)
class Shard:
    """Which part of an epoch: number `index` of `count`, and how many of its frames are left out at its start."""

    index: int = 0
    count: int = 1
    skip: int = 0


class FrameDataset(IterableDataset[Sample]):
    """Samples of all datasets of the mix; one iteration is one epoch, the next iteration the next one.

    Where a DataLoader of your own has it read by worker processes, the epoch is counted there and lost: call
    `set_epoch` before each epoch, and give it `multiprocessing_context="forkserver"`: a fork of a process that has
    read array_record may crash. `FrameLoader` does both.

    The order is a pure function of (members, configuration, epoch, number of parts). An episode belongs to one
    part of rank and worker, so that no frame comes twice. The shuffle buffer holds numbers; an episode is read
    when the first of its frames is due, and its other frames wait as encoded bytes, of at most as many frames as
    the buffer holds and one episode.

    Args:
        members: datasets of the mix.
        config: the user's.
        rank, world_size: of the training processes.
    """

    def __init__(self, members: Sequence[Member], config: EcotConfig, rank: int = 0, world_size: int = 1) -> None:
        self.members, self.config = tuple(members), config
        self.rank, self.world_size = rank, world_size
        self.maker = SampleMaker(config)
        self._mixture = Mixture({member.name: member.weight for member in members})
        self._lengths = {member.name: member.lengths for member in members}
        self._epoch = self._position = 0

    @property
    def dataset_statistics(self) -> dict[str, Any]:
        """In OpenVLA's schema, `{dataset: {action, proprio, num_transitions, num_trajectories}}`, JSON values."""
        return {member.name: member.statistics.to_dict() for member in self.members}

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins with this epoch's first frame."""
        self._epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands, for a dataset that is iterated in one process."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on after the frame that `state` was taken after; nothing is read again."""
        self._epoch, self._position = state["epoch"], state["position"]

    def __len__(self) -> int:
        """Frames of this rank in the epoch that comes next, if one process reads them."""
        return self.count(self._epoch, Shard(self.rank, self.world_size))

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shard = Shard(self.rank * workers + number, self.world_size * workers, self._position)
        for sample in self.samples(self._epoch, shard):
            self._position += 1
            yield sample
        self.set_epoch(self._epoch + 1)

    def count(self, epoch: int, shard: Shard) -> int:
        """Frames of a part of an epoch."""
        return sum(self._length(visit) for visit in self._visits(epoch, shard)) - shard.skip

    def samples(self, epoch: int, shard: Shard) -> Iterator[Sample]:
        """The samples of a part of an epoch, in order."""
        c = self.config.ecot
        visits = self._visits(epoch, shard)
        rng = np.random.default_rng((self.config.seed, epoch, 1, shard.index))
        buffer = -(-c.shuffle_buffer_size * self.world_size // shard.count) if c.train else 0
        order = frame_order([self._length(visit) for visit in visits], buffer, rng)
        given = Counter[int]()
        gone: defaultdict[int, set[int]] = defaultdict(set)
        for turn, step in itertools.islice(order, shard.skip):
            given[turn] += 1
            gone[turn].add(step)
            if given[turn] == self._length(visits[turn]):
                del given[turn], gone[turn]
        opened = _OpenEpisodes(self, visits, gone, _threads(c.num_parallel_reads))
        yield from _in_order(
            order, lambda place: self.maker(opened.take(*place), epoch), _threads(c.num_parallel_calls)
        )

    def _visits(self, epoch: int, shard: Shard) -> list[Visit]:
        seed, train = self.config.seed, self.config.ecot.train
        epoch = epoch if train else 0
        repeats = self._mixture.repeats(self._lengths, seed, epoch)
        visits = epoch_visits(repeats.values(), seed, epoch, train)
        return visits[shard.index :: shard.count]

    def _length(self, visit: Visit) -> int:
        return int(self.members[visit.dataset].lengths[visit.episode])


class _OpenEpisodes:
    """Frames of the episodes that have begun, given out one by one; safe between threads."""

    def __init__(
        self, frames: FrameDataset, visits: Sequence[Visit], gone: dict[int, set[int]], reads: int
    ) -> None:
        self._frames, self._visits, self._gone = frames, visits, gone
        self._reading = threading.Semaphore(reads)
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[threading.Lock, dict[int, Frame]]] = {}

    def take(self, turn: int, step: int) -> Frame:
        with self._lock:
            lock, waiting = self._waiting.setdefault(turn, (threading.Lock(), {}))
        with lock:
            if not waiting:
                with self._reading:
                    waiting |= self._read(turn)
            frame = waiting.pop(step)
            if not waiting:
                with self._lock:
                    del self._waiting[turn]
        return frame

    def _read(self, turn: int) -> dict[int, Frame]:
        visit = self._visits[turn]
        frames = self._frames.members[visit.dataset].frames(visit)
        return {step: frame for step, frame in enumerate(frames) if step not in self._gone.get(turn, ())}


def _in_order(places: Iterator[Any], make: Any, threads: int) -> Iterator[Sample]:
    """`make` of each place, in order; several at a time if there is more than one thread."""
    if threads == 1:
        yield from map(make, places)
        return
    with ThreadPoolExecutor(threads, "ecot") as pool:
        ahead: list[Future[Sample]] = []
        try:
            for place in places:
                ahead.append(pool.submit(make, place))
                if len(ahead) >= _AHEAD * threads:
                    yield ahead.pop(0).result()
            while ahead:
                yield ahead.pop(0).result()
        finally:
            for future in ahead:
                future.cancel()


def _threads(wanted: Parallel) -> int:
    if isinstance(wanted, int):
        return wanted
    return 1 if get_worker_info() is not None else min(_MOST_THREADS, os.cpu_count() or 1)


#: Random numbers are drawn in blocks of this size.
_BLOCK = 4096


def epoch_visits(repeats: Iterable[IntArray], seed: int, epoch: int, shuffle: bool) -> list[Visit]:
    """All turns of one epoch, in order.

    Args:
        repeats: per dataset int64 [E], how often each episode comes (`Mixture.repeats`).
        seed, epoch: non-negative, of the order.
        shuffle: False keeps the datasets' own.
    """
    visits = [
        Visit(dataset, episode, copy)
        for dataset, times in enumerate(repeats)
        for episode, often in enumerate(times.tolist())
        for copy in range(often)
    ]
    rng = np.random.default_rng((seed, epoch, 0))
    return [visits[i] for i in rng.permutation(len(visits))] if shuffle else visits


def frame_order(lengths: Sequence[int], buffer: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(turn, step) of every frame of turns with these lengths, each exactly once.

    Frames enter a buffer in order, and the next one out is drawn from it once it holds more than `buffer`; 0 keeps
    their order.
    """
    luck = _uniform(rng)
    held: list[tuple[int, int]] = []
    for turn, length in enumerate(lengths):
        for step in range(length):
            held.append((turn, step))
            if len(held) > buffer:
                yield _take(held, next(luck))
    while held:
        yield _take(held, next(luck))


def _take(held: list[tuple[int, int]], place: float) -> tuple[int, int]:
    i = int(place * len(held))
    held[i], held[-1] = held[-1], held[i]
    return held.pop()


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(_BLOCK).tolist()
