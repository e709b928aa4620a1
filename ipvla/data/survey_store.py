"""Surveys on disk: each is made once and appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ipvla.data.source import DatasetError, EpisodeSource
from ipvla.data.standards.standard import Standard
from ipvla.data.survey import Survey, SurveyPart, combined, survey_part
from ipvla.files import write_text

logger = logging.getLogger(__name__)

#: Goes up when surveys of before are no longer what they would be now.
_VERSION = 1
#: So many episodes are read before their numbers are summed up.
PART_EPISODES = 256


def survey_path(directory: Path, source: EpisodeSource, standard: Standard) -> Path:
    """Where the survey of a dataset with a standard is: one file per content and settings.

    What the dataset's contents are is taken from its features and from its episodes' lengths, tasks and families;
    a copy at another place has the same survey.
    """
    digest = hashlib.sha256()
    features = {path: asdict(feature) for path, feature in source.features.items()}
    told = [_VERSION, source.name, features, standard.settings(), source.tasks, source.families]
    digest.update(json.dumps(told, sort_keys=True).encode())
    digest.update(np.asarray(source.lengths, np.int64).tobytes())
    return directory / f"{source.name}-{digest.hexdigest()[:16]}.json"


def publish_survey(path: Path, name: str, survey: Survey) -> None:
    """Writes a survey; whoever reads meanwhile finds none or a whole one."""
    write_text(path, json.dumps({"dataset": name, **survey.to_dict()}, allow_nan=False))


def load_survey(path: Path) -> Survey | None:
    """The inverse of `publish_survey`, None if there is none. DatasetError if the file is damaged."""
    try:
        return Survey.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path} is no survey of a dataset ({error!r}); delete it to have it made anew"
        ) from None


def surveyed(source: EpisodeSource, standard: Standard, directory: Path | None) -> Survey:
    """The survey under `directory`; if there is none, reads the dataset through in this process and publishes it.

    Without a directory nothing is kept for the next time. `ray_jobs.statistics` does the same with all CPUs of a
    cluster.

    Raises:
        DatasetError: the standard does not fit the dataset, or no episode can be used.
    """
    path = None if directory is None else survey_path(directory, source, standard)
    survey = None if path is None else load_survey(path)
    if survey is None:
        logger.info("reading the %d episodes of %s once", len(source.lengths), source.location)
        survey = combined(_parts(source, standard), source, standard)
        if path is not None:
            publish_survey(path, source.name, survey)
    return survey


def part_bounds(episodes: int) -> Iterator[tuple[int, int]]:
    """First and stop of each part of a dataset of so many episodes."""
    for first in range(0, episodes, PART_EPISODES):
        yield first, min(first + PART_EPISODES, episodes)


def _parts(source: EpisodeSource, standard: Standard) -> Iterator[SurveyPart]:
    for first, stop in part_bounds(len(source.lengths)):
        yield survey_part(source, standard, range(first, stop))
