"""What is only seen in episodes themselves: some of them, chosen evenly over a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.data.source import EpisodeSource
from ipvla.data.standards import Standard
from ipvla.data.standards.standard import EncodedEpisode, moving_steps
from ipvla.data.survey import Survey

FloatArray = npt.NDArray[np.float32]
#: The first bytes of encoded pictures.
_ENCODINGS = {b"\xff\xd8": "JPEG", b"\x89P": "PNG"}


@dataclass(frozen=True)
class Camera:
    """One view, as its first pictures of the sampled episodes are.

    Attributes:
        name: the standard's; `feature` is the dataset's.
        encoding: "JPEG", "PNG" or "video".
        sizes: (height, width) in pixels -> in how many episodes.
        broken: first pictures that could not be decoded.
    """

    name: str
    feature: str
    encoding: str
    sizes: Mapping[tuple[int, int], int]
    broken: int = 0


@dataclass(frozen=True)
class DatasetSample:
    """Some episodes of a dataset as its standard gives them, n in all, of N steps.

    Attributes:
        episodes: the source's numbers of them.
        actions, states: float32 [T, A] and [T, P] of each.
        cameras: by name.
        noops: share of recorded steps that do nothing (`moving_steps`); None where actions are no motions.
        reasoning: share of steps with a text of reasoning.
    """

    episodes: tuple[int, ...]
    actions: tuple[FloatArray, ...]
    states: tuple[FloatArray, ...]
    cameras: tuple[Camera, ...]
    noops: float | None
    reasoning: float


def evenly(among: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, from the first to the last at equal distances."""
    places = np.linspace(0, len(among) - 1, min(count, len(among))).round().astype(np.int64)
    return [among[place] for place in places.tolist()]


def take_sample(source: EpisodeSource, standard: Standard, survey: Survey, count: int) -> DatasetSample:
    """Reads `count` episodes, or all that can be used if these are fewer."""
    numbers = evenly(np.flatnonzero(survey.lengths > 0).tolist(), count)
    whole = replace(standard, skip_noops=False)
    has_motions = standard.gripper != "none" and not any(standard.absolute[:-1])
    actions, states, firsts = [], [], []
    idle = recorded = reasoned = kept = 0
    for number in numbers:
        trajectory = source.trajectory(number)
        episode = standard.episode(trajectory)
        actions.append(episode.action)
        states.append(episode.state)
        firsts.append(_first_pictures(episode))
        kept += len(episode)
        reasoned += sum(map(bool, episode.reasoning))
        if has_motions:
            moves = moving_steps(whole.episode(trajectory).action)
            idle, recorded = idle + int((~moves).sum()), recorded + len(moves)
    return DatasetSample(
        episodes=tuple(numbers),
        actions=tuple(actions),
        states=tuple(states),
        cameras=tuple(_camera(name, path, firsts) for name, path in standard.cameras.items()),
        noops=idle / recorded if has_motions else None,
        reasoning=reasoned / kept,
    )


_First = Mapping[str, tuple[str, tuple[int, int] | None]]


def _first_pictures(episode: EncodedEpisode) -> _First:
    """Camera -> encoding and size of the first kept picture, None for one that cannot be decoded."""
    found: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for camera, pictures in episode.pictures.items():
        try:
            height, width = episode.image(0, camera).shape[:2]
        except ValueError:
            found[camera] = _encoding(pictures, int(episode.raw_step[0])), None
        else:
            found[camera] = _encoding(pictures, int(episode.raw_step[0])), (height, width)
    return found


def _encoding(pictures: Pictures, step: int) -> str:
    if not isinstance(pictures, EncodedPictures):
        return "video"
    return _ENCODINGS.get(pictures.encoded[step][:2], "unknown")


def _camera(name: str, path: str, firsts: Sequence[_First]) -> Camera:
    encodings = Counter(first[name][0] for first in firsts)
    sizes = Counter(size for first in firsts if (size := first[name][1]) is not None)
    return Camera(name, path, " and ".join(encodings), dict(sizes.most_common()), len(firsts) - sizes.total())
