"""Episodes of any format, standardised: what training, probes and lanes read."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ipvla.data.byte_cache import ByteCache
from ipvla.data.episode import EncodedEpisode
from ipvla.data.reasoning import ReasonedSource, ReasoningConfig
from ipvla.data.rlds.format import STATISTICS_FILE
from ipvla.data.source import BrokenEpisodeError, DatasetError, EpisodeSource
from ipvla.data.sources import RldsBackend, open_source
from ipvla.data.standards import Standard, StandardConfig, adjusted, standard_for
from ipvla.data.standards.recorded import Recorded
from ipvla.data.statistics import Statistics
from ipvla.data.survey import Survey, surveyed
from ipvla.types import Observation


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
        cache_bytes: bound on the encoded episodes and decoded frames kept in memory.
        standard: how its features become robot episodes; None for the one that its name or features tell.
        skip_noops: leave out steps that do nothing.
        padded_state: a 0 before the gripper in the state of LIBERO and Bridge, as OpenVLA has it.
        read_root: where what is only known once it was read is kept for the next opening: where its episodes lie,
            their lengths, statistics. None to keep nothing.
        skip_bad_episodes: leave out episodes that cannot be read, and count them.
        skip_unlabelled: leave out episodes whose task is not told in words.
        rlds_backend: "native", or "dlimp" for TensorFlow's own way to read RLDS.
        reasoning: of its episodes, from a file beside it; None for what the dataset itself recorded.

    Raises:
        DatasetError: it or the reasoning is missing or damaged, or nothing tells its standard.
    """
    source = open_source(
        location, read_root=read_root, skip_bad_episodes=skip_bad_episodes, rlds_backend=rlds_backend
    )
    made = standard.build(source.name, source.features) if standard else standard_for(source.name, source.features)
    made = adjusted(made, skip_noops=skip_noops, padded_state=padded_state)
    return EpisodeDataset(
        source,
        made,
        cache_bytes,
        read_root=read_root,
        skips_bad_episodes=skip_bad_episodes,
        skips_unlabelled=skip_unlabelled,
        reasoned=None if reasoning is None else reasoning.build(source, _reasoning_cache(read_root)),
    )


def _reasoning_cache(read_root: Path | None) -> Path:
    return (read_root or Path(tempfile.gettempdir()) / "ipvla") / "reasoning"


class EpisodeDataset:
    """The standardised episodes of one source, by index; safe to use from several threads.

    Args:
        source: the episodes as they lie on disk.
        standard: how they become robot episodes.
        cache_bytes: bound on the encoded episodes and decoded frames kept in memory.
        read_root: where its survey is kept, if it needs one; None to keep none.
        skips_unlabelled: episodes whose task is not told in words are left out; statistics count them even so.
        skips_bad_episodes: whoever reads it does without what turns out to be unreadable.
        reasoned: the source's episodes with their reasoning, if they have any from elsewhere.

    Attributes:
        name, location: the source's.
        broken: how many of the source's episodes are left out, which only skipping allows.
        lengths: int64 [E], control steps per standardised episode.
        tasks, families: one name per episode; a dataset that has none gives the instruction and "".
        cameras: names of the views.
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
        self.reasoned = reasoned
        self._read_root = read_root
        self.skips_bad_episodes = skips_bad_episodes
        self.standard = standard
        self.name, self.location = source.name, source.location
        lengths = source.lengths - sum(standard.trimmed) if standard.known_length else self._survey.lengths
        left = lengths > 0
        self.broken = int((~left).sum()) + len(getattr(source, "broken", ()))
        if not left.all() and not skips_bad_episodes:
            number = int(np.argmin(lengths > 0))
            reason = "" if standard.known_length else f": {self._survey.broken.get(number, '')}"
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
        tasks, families = source.tasks, source.families  # once: a source may put them together anew
        self.tasks = tuple(tasks[number] for number in self._numbers.tolist())
        self.families = tuple(families[number] for number in self._numbers.tolist())
        self._episodes = ByteCache[int, EncodedEpisode](cache_bytes // 4, lambda episode: episode.nbytes)
        self._frames = ByteCache[tuple[int, int, str], npt.NDArray[np.uint8]](
            cache_bytes - cache_bytes // 4, lambda frame: frame.nbytes
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(sorted(self.standard.cameras))

    @property
    def step_features(self) -> frozenset[str]:
        """What an episode's steps may have recorded, by the source's names."""
        return frozenset((self.reasoned or self._source).features)

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

    def observation(self, index: int, t: int, cameras: Sequence[str]) -> Observation:
        """What the demonstrator saw at control step `t`, as a simulator would give it."""
        episode = self.episode(index)
        images = {camera: self.frame(index, t, camera) for camera in cameras}
        return Observation(images, episode.state[t], episode.instruction, t)

    def statistics(self) -> Statistics:
        """Read from the file beside the shards where this project wrote it, else from the survey of all episodes.

        What another program wrote beside its dataset may be of another standard.

        Raises:
            ValueError: the file is not in OpenVLA's schema, or of another action size than the episodes.
        """
        path = Path(self.location) / STATISTICS_FILE
        if isinstance(self.standard, Recorded) and self.standard.known_length and path.is_file():
            return Statistics.load(path, len(self.standard.normalised))
        return self._survey.statistics

    @cached_property
    def _survey(self) -> Survey:
        return surveyed(self._source, self.standard, self._read_root)

    def _read(self, index: int) -> EncodedEpisode:
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} is outside the {len(self)} episodes of {self.location}")
        return self.standard.episode((self.reasoned or self._source).trajectory(int(self._numbers[index])))

    def _decode(self, index: int, t: int, camera: str) -> npt.NDArray[np.uint8]:
        try:
            frame = self.episode(index).image(t, camera)
        except BrokenEpisodeError:
            raise
        except ValueError as error:
            raise BrokenEpisodeError(f"{self.name}: {self.location}, episode {index}: {error}") from error
        frame.flags.writeable = False
        return frame
