"""What in a dataset will probably do harm, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluators.dataset_gripper import suspicions
from evaluators.dataset_sample import DatasetSample
from ipvla.data.normalisation import FeatureStatistics
from ipvla.data.standards import Standard
from ipvla.data.standards.libero import Libero, Recorded
from ipvla.data.statistics import FEW_TRANSITIONS
from ipvla.data.survey import Survey

#: More steps than this share doing nothing are many.
_MANY_NOOPS = 0.1
_PLAYED_BACK = ": it is no target of training, and is played back as recorded"
#: How far a value may be outside its range before it is told: rounding is not.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DatasetWarning:
    """One thing that is suspicious.

    Attributes:
        what: was found, with the numbers.
        remedy: what to do about it.
    """

    what: str
    remedy: str


def dataset_warnings(
    standard: Standard, survey: Survey, sample: DatasetSample, broken: int = 0
) -> tuple[DatasetWarning, ...]:
    """All that apply; the gripper's start and fingers, no-ops and cameras are judged by the sample.

    Args:
        broken: episodes that cannot be used, those that the source has left out included.
    """
    found: list[Iterable[DatasetWarning]] = [
        _size(survey, broken),
        _equal_quantiles("action", survey.statistics.action),
        _equal_quantiles("proprioception", survey.statistics.proprio),
        _outside(standard, survey.statistics.action),
        _gripper(standard, survey.statistics.action, sample),
        _noops(standard, sample),
        _cameras(sample),
    ]
    return tuple(warning for each in found for warning in each)


def _size(survey: Survey, broken: int) -> Iterator[DatasetWarning]:
    used = survey.lengths > 0
    if broken:
        yield DatasetWarning(
            f"{broken} of {broken + int(used.sum())} episodes cannot be used",
            "copy or collect them again, or train without them: data.skip_bad_episodes",
        )
    if survey.statistics.num_transitions < FEW_TRANSITIONS:
        yield DatasetWarning(
            f"{survey.statistics.num_transitions} transitions are fewer than {FEW_TRANSITIONS:,}: the quantiles "
            "q01 and q99 are rough",
            "normalise by the minimum and maximum (data.normalisation bounds), or give more demonstrations",
        )
    if single := int((survey.lengths == 1).sum()):
        yield DatasetWarning(
            f"{_episodes(single)} of one step: nothing to remember, and a chunk of actions ends at once",
            "see whether the recording broke off; leave them out if it did",
        )
    if unlabelled := int((~survey.labelled & used).sum()):
        yield DatasetWarning(
            f"{_episodes(unlabelled)} without a task in words: the policy is asked to do it with an empty prompt",
            "say where the words are (standard.language), or label them; OpenVLA trains on no such episodes",
        )
    if reworded := int((survey.reworded & used).sum()):
        yield DatasetWarning(
            f"the task in words changes within {_episodes(reworded)}: the first words are used throughout",
            "split the episodes where the words change, or collect them with one instruction each",
        )


def _equal_quantiles(what: str, statistics: FeatureStatistics) -> Iterator[DatasetWarning]:
    equal = statistics.mask & (statistics.q01 == statistics.q99)
    if (constant := equal & statistics.constant).any():
        yield DatasetWarning(
            f"{what} {_dimensions(constant)}: q01 = q99, and no other value was recorded; it is normalised to 0",
            f"nothing if it is meant to be constant{_PLAYED_BACK if what == 'action' else ''}",
        )
    if (rare := equal & ~statistics.constant).any():
        yield DatasetWarning(
            f"{what} {_dimensions(rare)}: q01 = q99, although less than one step in fifty has other values; under "
            "bounds_q99 it is 0 throughout and what is rare is lost",
            "set data.normalisation to bounds or normal, or leave out steps that do nothing (data.skip_noops)",
        )


def _outside(standard: Standard, statistics: FeatureStatistics) -> Iterator[DatasetWarning]:
    if not (standard.gripper == "environment" or isinstance(standard, Recorded | Libero)):
        return  # units of their own: nothing tells what is clipped
    reach = np.maximum(-statistics.min, statistics.max)
    beyond = (reach > 1 + _TOLERANCE) & ~np.array(standard.absolute)
    if beyond.any():
        yield DatasetWarning(
            f"action {_dimensions(beyond)} up to {reach[beyond].max():.3g} in size: the environment clips to "
            "[-1, 1] what the policy learns to give",
            "clip or rescale the actions in the dataset, or see whether they are in other units",
        )


def _gripper(standard: Standard, statistics: FeatureStatistics, sample: DatasetSample) -> Iterator[DatasetWarning]:
    for found in suspicions(standard, statistics, sample):
        yield DatasetWarning(
            f"the gripper's sign is suspicious: {found}",
            "look at the pictures; configure the standard (standard.gripper), or correct the recorded actions",
        )


def _noops(standard: Standard, sample: DatasetSample) -> Iterator[DatasetWarning]:
    if sample.noops is not None and sample.noops > _MANY_NOOPS and not standard.skip_noops:
        yield DatasetWarning(
            f"{sample.noops:.0%} of the steps do nothing: a policy learns to stand still",
            "leave them out: data.skip_noops (statistics change with it)",
        )


def _cameras(sample: DatasetSample) -> Iterator[DatasetWarning]:
    for camera in sample.cameras:
        if camera.broken:
            yield DatasetWarning(
                f"camera {camera.name}: the first picture of {_episodes(camera.broken)} cannot be decoded",
                "copy or collect them again, or train without them: data.skip_bad_episodes",
            )
        sizes = ", ".join(f"{width} x {height}" for height, width in camera.sizes)
        if len(camera.sizes) > 1:
            yield DatasetWarning(
                f"camera {camera.name} has pictures of several sizes: {sizes}",
                "see whether several cameras are mixed under one name; all are scaled to data.image_size",
            )
        elif any(height != width for height, width in camera.sizes):
            yield DatasetWarning(
                f"camera {camera.name} has pictures of {sizes}: training squeezes them to squares",
                "nothing if rollouts show the same shape; else crop them",
            )


def _episodes(count: int) -> str:
    return "1 episode" if count == 1 else f"{count} episodes"


def _dimensions(which: npt.NDArray[np.bool_]) -> str:
    return ", ".join(map(str, np.flatnonzero(which)))
