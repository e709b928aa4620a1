"""What reading a dataset with its standard finds: lengths, statistics, broken episodes.

A survey is made once and stored on disk, where it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ipvla.data.normalisation import FeatureSummary, tail_size
from ipvla.data.source import BrokenEpisodeError, DatasetError, EpisodeSource
from ipvla.data.standards.standard import Standard
from ipvla.data.statistics import Statistics, warn_of_few
from ipvla.files import one_line, record_of, write_text

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
#: Goes up when surveys of before are no longer what they would be now.
_SURVEY_VERSION = 2
#: So many episodes are read before their numbers are summed up.
PART_EPISODES = 256


@dataclass(frozen=True)
class Survey:
    """A whole dataset as its standard gives it.

    Attributes:
        lengths: int64 [E], control steps of each episode that its standard keeps, 0 of one that is broken.
        labelled: bool [E], whether the task is given in words. OpenVLA trains on no others; statistics count all.
        broken: episode -> what is wrong with it.
        statistics: over all episodes that are not broken.
        reworded: bool [E], whether the task in words changes within the episode, of which the first is used.
        instructions: all tasks in words, each once, sorted.
    """

    lengths: IntArray
    labelled: npt.NDArray[np.bool_]
    broken: Mapping[int, str]
    statistics: Statistics
    reworded: npt.NDArray[np.bool_]
    instructions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` gives back an equal survey."""
        return {
            "lengths": self.lengths.tolist(),
            "unlabelled": np.nonzero(~self.labelled)[0].tolist(),
            "broken": {str(episode): message for episode, message in self.broken.items()},
            "statistics": self.statistics.to_dict(),
            "reworded": np.nonzero(self.reworded)[0].tolist(),
            "instructions": list(self.instructions),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        lengths = np.array(values["lengths"], np.int64)
        labelled = np.ones(len(lengths), np.bool_)
        labelled[values["unlabelled"]] = False
        reworded = np.zeros(len(lengths), np.bool_)
        reworded[values["reworded"]] = True
        broken = {int(episode): message for episode, message in values["broken"].items()}
        statistics = Statistics.from_dict(values["statistics"])
        return cls(lengths, labelled, broken, statistics, reworded, tuple(values["instructions"]))


@dataclass(frozen=True)
class SurveyPart:
    """Some episodes; parts of any grouping merge into the same whole.

    Attributes:
        episodes: int64 [n], their numbers.
        lengths, labelled, reworded, broken, instructions: as in `Survey`, of these episodes.
        action, proprio: of those that are not broken, None if all are.
    """

    episodes: IntArray
    lengths: IntArray
    labelled: npt.NDArray[np.bool_]
    reworded: npt.NDArray[np.bool_]
    broken: Mapping[int, str]
    instructions: frozenset[str]
    action: FeatureSummary | None
    proprio: FeatureSummary | None


def survey_part(source: EpisodeSource, standard: Standard, episodes: Sequence[int]) -> SurveyPart:
    """Reads these episodes. DatasetError if the standard does not fit the dataset."""
    actions, states, broken, instructions = [], [], {}, set()
    lengths = np.zeros(len(episodes), np.int64)
    labelled, reworded = np.zeros((2, len(episodes)), np.bool_)
    for row, index in enumerate(episodes):
        try:
            episode = standard.episode(source.trajectory(index))
        except BrokenEpisodeError as error:
            broken[index] = str(error)
            continue
        lengths[row], labelled[row] = len(episode), bool(episode.instruction)
        reworded[row] = bool(episode.wordings)
        instructions.add(episode.instruction)
        actions.append(episode.action)
        states.append(episode.state)
    tail = tail_size(int(source.lengths.sum()))
    summaries = [FeatureSummary.of(feature, tail) if feature else None for feature in (actions, states)]
    numbers = np.array(episodes, np.int64)
    return SurveyPart(numbers, lengths, labelled, reworded, broken, frozenset(instructions), *summaries)


def merged(parts: Sequence[SurveyPart], source: EpisodeSource) -> SurveyPart:
    """One part of all their episodes, in the order of their numbers."""
    tail = tail_size(int(source.lengths.sum()))
    episodes = np.concatenate([part.episodes for part in parts])
    order = np.argsort(episodes, kind="stable")
    lengths = np.concatenate([part.lengths for part in parts])
    readable = np.argsort(episodes[lengths > 0], kind="stable")
    broken: dict[int, str] = {}
    for part in parts:
        broken |= part.broken
    return SurveyPart(
        episodes[order],
        lengths[order],
        np.concatenate([part.labelled for part in parts])[order],
        np.concatenate([part.reworded for part in parts])[order],
        dict(sorted(broken.items())),
        frozenset().union(*(part.instructions for part in parts)),
        _merged_summary([part.action for part in parts], tail, readable),
        _merged_summary([part.proprio for part in parts], tail, readable),
    )


def completed(part: SurveyPart, source: EpisodeSource, standard: Standard) -> Survey:
    """The survey of a whole dataset. DatasetError if episodes are missing, or none can be used."""
    if not np.array_equal(part.episodes, np.arange(len(source.lengths))):
        raise DatasetError(
            f"{source.location}: {len(np.unique(part.episodes))} of {len(source.lengths)} episodes were surveyed; "
            "start the survey again"
        )
    if part.action is None or part.proprio is None:
        first = next(iter(part.broken.values()))
        raise DatasetError(
            f"{source.location}: none of its {len(part.episodes)} episodes can be used with the standard "
            f"{standard.name!r}: {first}"
        )
    lengths = part.lengths[part.lengths > 0]
    warn_of_few(int(lengths.sum()))
    statistics = Statistics(
        action=part.action.statistics(lengths, np.array(standard.normalised, np.bool_)),
        proprio=part.proprio.statistics(lengths, np.ones(part.proprio.mean.shape[1], np.bool_)),
        num_transitions=int(lengths.sum()),
        num_trajectories=len(lengths),
    )
    instructions = tuple(sorted(part.instructions))
    return Survey(part.lengths, part.labelled, part.broken, statistics, part.reworded, instructions)


def combined(parts: Iterable[SurveyPart], source: EpisodeSource, standard: Standard) -> Survey:
    """The survey of a whole dataset from parts as they come, of which few are in memory at once."""
    whole: SurveyPart | None = None
    for part in parts:
        whole = part if whole is None else merged([whole, part], source)
    if whole is None:
        raise DatasetError(f"{source.location} has no episodes to survey; collect or copy it again")
    return completed(merged([whole], source), source, standard)


def _merged_summary(
    summaries: Sequence[FeatureSummary | None], tail: int, order: npt.NDArray[np.int64]
) -> FeatureSummary | None:
    present = [summary for summary in summaries if summary is not None]
    return FeatureSummary.merged(present, tail).ordered(order) if present else None


def survey_path(directory: Path, source: EpisodeSource, standard: Standard) -> Path:
    """Where the survey of a dataset with a standard is: one file per content and settings.

    What the dataset's contents are is taken from its features and from its episodes' lengths, tasks and families;
    a copy at another place has the same survey.
    """
    digest = hashlib.sha256()
    features = {path: asdict(feature) for path, feature in source.features.items()}
    content = [_SURVEY_VERSION, source.name, features, standard.settings(), source.tasks, source.families]
    digest.update(json.dumps(content, sort_keys=True).encode())
    digest.update(np.asarray(source.lengths, np.int64).tobytes())
    return directory / f"{source.name}-{digest.hexdigest()[:16]}.json"


def publish_survey(path: Path, name: str, survey: Survey) -> None:
    """Writes a survey; a reader meanwhile finds none or a whole one."""
    write_text(path, json.dumps({"dataset": name, **survey.to_dict()}, allow_nan=False))


def load_survey(path: Path) -> Survey | None:
    """The inverse of `publish_survey`, None if there is none. DatasetError if the file is damaged."""
    try:
        return Survey.from_dict(record_of(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (AttributeError, ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path} is no survey of a dataset ({one_line(error)}); delete it to have it made anew"
        ) from None


def surveyed(source: EpisodeSource, standard: Standard, directory: Path | None, *, anew: bool = False) -> Survey:
    """The survey under `directory`; if there is none, reads the dataset through in this process and publishes it.

    With `anew` one that is there is replaced. Without a directory nothing is stored.
    `ray_jobs.statistics` does the same with all CPUs of a cluster.

    Raises:
        DatasetError: the standard does not fit the dataset, or no episode can be used.
    """
    path = None if directory is None else survey_path(directory, source, standard)
    survey = None if path is None or anew else load_survey(path)
    if survey is None:
        logger.info("reading the %d episodes of %s once", len(source.lengths), source.name)
        bounds = part_bounds(len(source.lengths))
        parts = (survey_part(source, standard, range(first, stop)) for first, stop in bounds)
        survey = combined(parts, source, standard)
        if path is not None:
            publish_survey(path, source.name, survey)
    return survey


def repaired(source: EpisodeSource, standard: Standard, survey: Survey) -> bool:
    """Whether the first episode that was broken is so no longer."""
    if not survey.broken:
        return False
    try:
        standard.episode(source.trajectory(next(iter(survey.broken))))
    except BrokenEpisodeError:
        return False
    return True


def part_bounds(episodes: int) -> Iterator[tuple[int, int]]:
    """First and stop of each part of a dataset of so many episodes."""
    for first in range(0, episodes, PART_EPISODES):
        yield first, min(first + PART_EPISODES, episodes)
