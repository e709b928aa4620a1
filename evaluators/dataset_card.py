"""A dataset's card: its content, its size, and what is suspicious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from evaluators.dataset_sample import Camera, DatasetSample
from evaluators.dataset_warnings import DatasetWarning, dataset_warnings
from ipvla.data.source import EpisodeSource
from ipvla.data.standards import Standard
from ipvla.data.statistics import Statistics
from ipvla.data.survey import Survey


@dataclass(frozen=True)
class Lengths:
    """Of the episodes that can be used, in control steps that are kept."""

    least: int
    median: float
    mean: float
    most: int

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64]) -> Self:
        return cls(int(lengths.min()), float(np.median(lengths)), float(lengths.mean()), int(lengths.max()))


@dataclass(frozen=True)
class DatasetCard:
    """One dataset as its standard gives it.

    Attributes:
        name, location: the source's.
        format: "LeRobotDataset v3" or "RLDS", with the format of its records.
        standard: name of the standard's class, and what is not usual about it.
        fps: control steps per second; None where the dataset does not say.
        episodes: that can be used; `transitions` are their control steps.
        broken: what is wrong with each of those that cannot be.
        unlabelled: episodes that can be used and have no task in words.
        reworded: episodes that can be used and within which the task in words changes.
        tasks: episodes of each, most first; `families` likewise, without "".
        statistics: over all episodes that can be used.
        sampled: of how many episodes `cameras`, `noops` and `reasoning` are (`DatasetSample`).
    """

    name: str
    location: str
    format: str
    standard: str
    fps: float | None
    episodes: int
    transitions: int
    broken: tuple[str, ...]
    unlabelled: int
    reworded: int
    lengths: Lengths
    tasks: Mapping[str, int]
    families: Mapping[str, int]
    statistics: Statistics
    sampled: int
    cameras: tuple[Camera, ...]
    noops: float | None
    reasoning: float
    warnings: tuple[DatasetWarning, ...]


def dataset_card(source: EpisodeSource, standard: Standard, survey: Survey, sample: DatasetSample) -> DatasetCard:
    """The card; `survey` and `sample` are of this source with this standard."""
    used = survey.lengths > 0
    broken = (*source.broken, *survey.broken.values())
    numbers = np.flatnonzero(used).tolist()
    families = Counter(family for number in numbers if (family := source.families[number]))
    return DatasetCard(
        name=source.name,
        location=source.location,
        format=source.format,
        standard=_described(standard),
        fps=source.fps,
        episodes=len(numbers),
        transitions=survey.statistics.num_transitions,
        broken=broken,
        unlabelled=int((~survey.labelled & used).sum()),
        reworded=int((survey.reworded & used).sum()),
        lengths=Lengths.of(survey.lengths[used]),
        tasks=dict(Counter(source.tasks[number] for number in numbers).most_common()),
        families=dict(families.most_common()),
        statistics=survey.statistics,
        sampled=len(sample.episodes),
        cameras=sample.cameras,
        noops=sample.noops,
        reasoning=sample.reasoning,
        warnings=dataset_warnings(standard, survey, sample, len(broken)),
    )


def _described(standard: Standard) -> str:
    notes = [f"gripper {standard.gripper}"]
    if any(standard.trimmed):
        notes.append("without the first {} and last {} steps".format(*standard.trimmed))
    if getattr(standard, "padded_state", False):
        notes.append("state padded as OpenVLA's")
    if standard.skip_noops:
        notes.append("without steps that do nothing")
    return f"{type(standard).__name__}: {', '.join(notes)}"
