"""Episodes of any format, standardised: what training, probes and lanes read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import numpy.typing as npt

from ipvla.data.byte_cache import ByteCache
from ipvla.data.episode import EncodedEpisode
from ipvla.data.rlds.format import STATISTICS_FILE
from ipvla.data.rlds.source import RldsSource
from ipvla.data.source import BrokenEpisodeError, DatasetError, EpisodeSource
from ipvla.data.standards import Standard, standard_for
from ipvla.data.statistics import Statistics
from ipvla.types import Observation


def open_dataset(
    location: str | Path,
    cache_bytes: int = 1 << 30,
    *,
    standard: Standard | None = None,
    index_root: Path | None = None,
    skip_bad_episodes: bool = False,
) -> EpisodeDataset:
    """The dataset at a directory or address, whatever its format.

    Args:
        location: an RLDS version directory (`<data_root>/recall/1.0.0`) or a LeRobotDataset v3.
        cache_bytes: bound on the encoded episodes and decoded frames kept in memory.
        standard: how its features become robot episodes; None for the one that its name or features tell.
        index_root: where a list of its episodes is kept for the next opening; None to keep none.
        skip_bad_episodes: leave out episodes that cannot be read, and count them.

    Raises:
        DatasetError: it is missing or damaged, or nothing tells its standard.
    """
    source = RldsSource(location, index_root=index_root, skip_bad_episodes=skip_bad_episodes)
    return EpisodeDataset(
        source,
        standard or standard_for(source.name, source.features),
        cache_bytes,
        skips_bad_episodes=skip_bad_episodes,
    )


class EpisodeDataset:
    """The standardised episodes of one source, by index; safe to use from several threads.

    Args:
        source: the episodes as they lie on disk.
        standard: how they become robot episodes.
        cache_bytes: bound on the encoded episodes and decoded frames kept in memory.
        skips_bad_episodes: whoever reads it does without what turns out to be unreadable.

    Attributes:
        name, location: the source's.
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
        skips_bad_episodes: bool = False,
    ) -> None:
        self._source = source
        self.skips_bad_episodes = skips_bad_episodes
        self.standard = standard
        self.name, self.location = source.name, source.location
        self.lengths: npt.NDArray[np.int64] = source.lengths - sum(standard.trimmed)
        if len(short := np.nonzero(self.lengths < 1)[0]):
            raise DatasetError(
                f"{self.location}: of episode {short[0]}'s {source.lengths[short[0]]} steps the standard "
                f"{standard.name!r} leaves none; leave episodes so short out"
            )
        self.tasks, self.families = source.tasks, source.families
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
        return frozenset(self._source.features)

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
        """Read from the file beside the shards, or computed from all episodes if there is none.

        Raises:
            ValueError: the file is not in OpenVLA's schema, or of another action size than the episodes.
        """
        files, root = fsspec.core.url_to_fs(self.location)
        path = f"{root}/{STATISTICS_FILE}"
        if files.exists(path):
            return Statistics.load(Path(path), self.episode(0).action.shape[1])
        episodes = [self._read(index) for index in range(len(self))]
        return Statistics.compute([e.action for e in episodes], [e.state for e in episodes])

    def _read(self, index: int) -> EncodedEpisode:
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} is outside the {len(self)} episodes of {self.location}")
        return self.standard.episode(self._source.trajectory(index))

    def _decode(self, index: int, t: int, camera: str) -> npt.NDArray[np.uint8]:
        try:
            frame = self.episode(index).image(t, camera)
        except BrokenEpisodeError:
            raise
        except ValueError as error:
            raise BrokenEpisodeError(f"{self.name}: {self.location}, episode {index}: {error}") from error
        frame.flags.writeable = False
        return frame
