"""Episodes of any format, standardised: what training, probes and lanes read."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ipvla.contract import Contract, Orientation
from ipvla.data.geometry import PointTerms, geometry_paths
from ipvla.data.reasoning import Coverage, ReasonedSource, ReasoningConfig
from ipvla.data.recording import Recording
from ipvla.data.rlds.format import STATISTICS_FILE
from ipvla.data.source import BrokenEpisodeError, DatasetError, EpisodeSource
from ipvla.data.sources import RldsBackend, open_source
from ipvla.data.standards import Standard, StandardConfig, standard_of
from ipvla.data.standards.libero import Recorded
from ipvla.data.standards.standard import EncodedEpisode
from ipvla.data.statistics import Statistics
from ipvla.data.survey import Survey, repaired, surveyed
from ipvla.geometry import CameraGeometry
from ipvla.storage import private_temporary_directory
from ipvla.types import Observation

logger = logging.getLogger(__name__)

#: Metres, the unit of a depth of which nothing tells it.
_MILLIMETRE = 1e-3


def open_dataset(
    location: str | Path,
    cache_bytes: int = 1 << 30,
    *,
    standard: StandardConfig | None = None,
    skip_noops: bool = False,
    padded_state: bool = False,
    read_root: Path | None = None,
    skip_bad_episodes: bool = False,
    skip_unlabelled: bool = False,
    rlds_backend: RldsBackend = "native",
    reasoning: ReasoningConfig | None = None,
) -> EpisodeDataset:
    """The dataset at a directory or address, whatever its format.

    Args:
        location: an RLDS version directory (`<data_root>/recall/1.0.0`) or a LeRobotDataset v3.
        cache_bytes: bound on the encoded episodes and decoded frames in memory.
        standard: how its features become robot episodes; None for the one of its name or features.
        skip_noops: leave out steps that do nothing.
        padded_state: a 0 before the gripper in the state of LIBERO and Bridge, as OpenVLA has it.
        read_root: directory for what one reading finds, for the next opening: positions of episodes, their
            lengths, statistics. None to store nothing.
        skip_bad_episodes: leave out episodes that cannot be read, and count them.
        skip_unlabelled: leave out episodes without a task in words.
        rlds_backend: "native", or "dlimp" for TensorFlow's own way to read RLDS.
        reasoning: of its episodes, from a file beside it; None for what the dataset itself recorded.

    Raises:
        DatasetError: it or the reasoning is missing or damaged, or its standard is unknown.
    """
    source = open_source(
        location, read_root=read_root, skip_bad_episodes=skip_bad_episodes, rlds_backend=rlds_backend
    )
    cache = read_root or private_temporary_directory()
    made = standard_of(source, standard, skip_noops=skip_noops, padded_state=padded_state)
    return EpisodeDataset(
        source,
        made,
        cache_bytes,
        read_root=read_root,
        skips_bad_episodes=skip_bad_episodes,
        skips_unlabelled=skip_unlabelled,
        reasoned=None if reasoning is None else reasoning.build(source, cache / "reasoning"),
    )


class EpisodeDataset:
    """The standardised episodes of one source, by index; safe to use from several threads.

    Args:
        source: the episodes as they lie on disk.
        standard: how they become robot episodes.
        cache_bytes: bound on the encoded episodes and decoded frames in memory.
        read_root: directory for its survey, if it needs one; None to store none.
        skips_unlabelled: episodes without a task in words are left out; statistics count them nevertheless.
        skips_bad_episodes: readers skip what turns out to be unreadable; the dataset is read once, to find and
            leave out such episodes.
        reasoned: the source's episodes with their reasoning, if they have any from elsewhere.

    Attributes:
        name, location: of the source.
        cameras: names of the views, sorted.
        step_features: what an episode's steps may have recorded, by the source's names.
        broken: how many episodes are left out, which only skipping allows.
        lengths: int64 [E], control steps per episode.
        tasks, families: one name per episode; a dataset that has none gives the instruction and "".
    """

    def __init__(
        self,
        source: EpisodeSource,
        standard: Standard,
        cache_bytes: int = 1 << 30,
        *,
        read_root: Path | None = None,
        skips_bad_episodes: bool = False,
        skips_unlabelled: bool = False,
        reasoned: ReasonedSource | None = None,
    ) -> None:
        self._source = source
        self._reasoned = reasoned
        self._read_root = read_root
        self.skips_bad_episodes = skips_bad_episodes
        self.standard = standard
        self.name, self.location = source.name, source.location
        self.cameras = tuple(sorted(standard.cameras))
        self.step_features = frozenset((reasoned or source).features)
        expected = source.lengths - sum(standard.trimmed)
        known = standard.known_length and not (skips_bad_episodes and (expected > 0).any())
        lengths = expected if known else self._lengths()
        left = lengths > 0
        self.broken = int((~left).sum()) + len(source.broken)
        if not left.all() and not skips_bad_episodes:
            number = int(np.argmin(lengths > 0))
            reason = "" if known else f": {self._survey.broken.get(number, '')}"
            raise BrokenEpisodeError(
                f"{self.location}: of episode {number}'s {source.lengths[number]} steps the standard "
                f"{standard.name!r} leaves none{reason}; set skip_bad_episodes to go on without such episodes"
            )
        #: The source's number of each episode.
        self._numbers = np.nonzero(left & self._survey.labelled if skips_unlabelled else left)[0]
        if not len(self._numbers):
            raise DatasetError(
                f"{self.location}: the standard {standard.name!r} leaves no episode"
                f"{' with a task in words' if skips_unlabelled else ''}; correct it"
            )
        self.lengths: npt.NDArray[np.int64] = lengths[self._numbers]
        self.tasks = tuple(source.tasks[number] for number in self._numbers.tolist())
        self.families = tuple(source.families[number] for number in self._numbers.tolist())
        self._episodes = ByteCache[int, EncodedEpisode](cache_bytes // 4, lambda episode: episode.nbytes)
        self._frames = ByteCache[tuple[int, int, str], npt.NDArray[np.uint8]](
            cache_bytes - cache_bytes // 4, lambda frame: frame.nbytes
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def contract(self) -> Contract:
        """On which terms it was recorded, as far as its standard or its own file states them."""
        terms = self._recording.over(self.standard.contract(self.statistics().proprio.dim))
        return terms if self.without_geometry(self.cameras)[0] else replace(terms, geometry=True)

    @cached_property
    def _recording(self) -> Recording:
        return Recording.of(self._source)

    def without_geometry(self, cameras: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those of these cameras that have no depth, and those that have no intrinsics or no pose."""
        paths = {camera: geometry_paths(self.standard.cameras[camera]) for camera in cameras}
        there = {camera: [path in self.step_features for path in of_it] for camera, of_it in paths.items()}
        return (
            tuple(camera for camera, (depth, *_) in there.items() if not depth),
            tuple(camera for camera, (_, *rest) in there.items() if not all(rest)),
        )

    @cached_property
    def pictures_every(self) -> int:
        """Control steps from one new picture to the next, see `Recording`."""
        return self._recording.pictures_every

    def part(self, index: int) -> str:
        """The name of the dataset that an episode is of: this one's."""
        return self.name

    def repeats(self, seed: int, epoch: int) -> None:
        """How often each episode is seen in an epoch: None, for once."""

    def episode(self, index: int) -> EncodedEpisode:
        """Raises BrokenEpisodeError if it cannot be read, IndexError outside [0, len)."""
        return self._episodes.get(index, lambda: self._read(index))

    def frame(self, index: int, t: int, camera: str) -> npt.NDArray[np.uint8]:
        """One decoded frame, uint8 [H, W, 3] RGB, read-only because it is cached."""
        return self._frames.get((index, t, camera), lambda: self._decode(index, t, camera))

    def observation(
        self, index: int, t: int, cameras: Sequence[str], points: PointTerms | None = None
    ) -> Observation:
        """What the demonstrator saw at control step `t`, as a simulator would give it.

        Args:
            points: give the geometry of the pictures as well, on these terms; None for none.

        Raises:
            BrokenEpisodeError: a picture or its depth cannot be read.
        """
        episode = self.episode(index)
        images = {camera: self.frame(index, t, camera) for camera in cameras}
        geometry = (
            None if points is None else {camera: self._geometry(index, t, camera, points) for camera in cameras}
        )
        return Observation(images, episode.state[t], episode.instruction, t, geometry=geometry)

    def _geometry(self, index: int, t: int, camera: str, points: PointTerms) -> CameraGeometry:
        episode = self.episode(index)
        unit_m = self._recording.depth_unit_m or _MILLIMETRE
        try:
            if camera not in episode.geometry:
                raise ValueError(f"camera {camera!r} has no depth")
            turned = self._orientation
            return episode.geometry[camera].at(int(episode.raw_step[t]), unit_m, turned, points)
        except ValueError as error:
            raise BrokenEpisodeError(
                f"{self.name}: {self.location}, episode {index}, step {t}: {error}"
            ) from error

    @cached_property
    def _orientation(self) -> Orientation:
        return self.contract.pictures.orientation

    def statistics(self) -> Statistics:
        """Read from the file beside the shards if it is of these episodes, else from the survey of all of them.

        What another program wrote beside its dataset may be of another standard, or of other episodes: a file that
        does not count as many episodes and control steps as there are is not used, and the log says so.

        Raises:
            ValueError: the file is not in OpenVLA's schema, or of another action size than the episodes.
        """
        return self._written_statistics or self._survey.statistics

    def mixed(self) -> dict[str, Statistics]:
        """Of each of several datasets, by its name: {} for one."""
        return {}

    def instructions(self) -> frozenset[str]:
        """All tasks in words: of the survey, or else of the first episode of each task that can be read."""
        if self._needs_survey:
            return frozenset(self._survey.instructions)
        instructions = {}
        for index, task in enumerate(self.tasks):
            if task not in instructions:
                with suppress(BrokenEpisodeError):
                    instructions[task] = self.episode(index).instruction
        return frozenset(instructions.values())

    def coverage(self) -> list[tuple[str, Coverage]]:
        """Of each dataset with reasoning from elsewhere, by its name, how many episodes have some."""
        return [] if self._reasoned is None else [(self.name, self._reasoned.coverage())]

    def require_readable(self) -> None:
        """BrokenEpisodeError if episodes are known to be broken and are not skipped."""
        if self.skips_bad_episodes or not self._needs_survey or not self._survey.broken:
            return
        first = next(iter(self._survey.broken.values()))
        raise BrokenEpisodeError(
            f"{len(self._survey.broken)} of the {len(self._source.lengths)} episodes of {self.location} cannot be "
            f"used: {first}; set skip_bad_episodes to go on without such episodes"
        )

    @property
    def reworded(self) -> int:
        """In how many episodes the task in words changes, as far as the dataset had to be read."""
        return int(self._survey.reworded[self._numbers].sum()) if self._needs_survey else 0

    @property
    def _needs_survey(self) -> bool:
        return self._written_statistics is None or "_survey" in self.__dict__

    @cached_property
    def _written_statistics(self) -> Statistics | None:
        path = Path(self.location) / STATISTICS_FILE
        if not (isinstance(self.standard, Recorded) and self.standard.known_length and path.is_file()):
            return None
        try:
            wrong = self._contradiction(Statistics.load(path))
        except ValueError as error:
            wrong = str(error)
        if wrong:
            logger.warning("%s: %s; its statistics are computed from its episodes", self.location, wrong)
            return None
        return Statistics.load(path, len(self.standard.normalised))

    def _contradiction(self, written: Statistics) -> str:
        """What in statistics cannot be of these episodes, "" if nothing."""
        counts = len(self._source.lengths), int(self._source.lengths.sum())
        stated = written.num_trajectories, written.num_transitions
        if stated != counts:
            return (
                f"{STATISTICS_FILE} counts {stated[0]} episodes of {stated[1]} steps, and there are "
                f"{counts[0]} of {counts[1]}"
            )
        proprio = sum(math.prod(self._source.features[path].shape) for path in self.standard.paths[1])
        if written.proprio.dim != proprio:
            return f"{STATISTICS_FILE} is of {written.proprio.dim} numbers of proprioception, not of {proprio}"
        return ""

    def _lengths(self) -> npt.NDArray[np.int64]:
        """Of the survey; warns once of the broken episodes."""
        if self._survey.broken:
            first = next(iter(self._survey.broken.values()))
            logger.warning("%s: %d episodes are left out: %s", self.location, len(self._survey.broken), first)
        return self._survey.lengths

    @cached_property
    def _survey(self) -> Survey:
        survey = surveyed(self._source, self.standard, self._read_root)
        if repaired(self._source, self.standard, survey):  # which leaves lengths and tasks as they were
            survey = surveyed(self._source, self.standard, self._read_root, anew=True)
        return survey

    def _read(self, index: int) -> EncodedEpisode:
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} is outside the {len(self)} episodes of {self.location}")
        return self.standard.episode((self._reasoned or self._source).trajectory(int(self._numbers[index])))

    def _decode(self, index: int, t: int, camera: str) -> npt.NDArray[np.uint8]:
        try:
            frame = self.episode(index).image(t, camera)
        except BrokenEpisodeError:
            raise
        except ValueError as error:
            raise BrokenEpisodeError(f"{self.name}: {self.location}, episode {index}: {error}") from error
        frame.flags.writeable = False
        return frame


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
