"""What in a dataset will probably do harm, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluators.dataset_sample import DatasetSample
from ipvla.contract import environment_gripper
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
#: Sizes of LIBERO's state, as it is and as OpenVLA pads it; the two fingers are its end.
_STATES_WITH_FINGERS = (8, 9)
#: Control steps after which fingers have done what they were told.
_SETTLED = 8
#: Half of the way that LIBERO's fingers go, in metres.
_HALF_OPEN = 0.04
#: With fewer settled steps, fingers prove nothing.
_ENOUGH = 20


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
    for found in _suspicions(standard, statistics, sample):
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


def _suspicions(standard: Standard, statistics: FeatureStatistics, sample: DatasetSample) -> Iterator[str]:
    """What speaks against the sign that `standard.gripper` gives the last action dimension, in words.

    - Values outside those of the convention, or openings of 0 and 1 where -1 and +1 are meant.
    - LIBERO's fingers further apart where they have been told for a while to close than where to open.
    - Unless fingers do what they are told: one value throughout, or most episodes beginning closed, for robots
      usually begin open.
    """
    if standard.gripper == "none":
        return
    low, high = float(statistics.min[-1]), float(statistics.max[-1])
    lowest, open_value, closed_value = (-1, -1, 1) if standard.gripper == "environment" else (0, 1, 0)
    convention = f"{standard.gripper} takes {open_value} for open and {closed_value} for closed"
    if low < lowest - _TOLERANCE or high > 1 + _TOLERANCE:
        yield (f"it goes from {low:.3g} to {high:.3g}; {convention}")
    elif standard.gripper == "environment" and -_TOLERANCE <= low < 0.5:
        yield (f"it goes from {low:.3g} to {high:.3g}, as openings of 0 and 1 do; {convention}")
    closed = [environment_gripper(action[:, -1], standard.gripper) > 0 for action in sample.actions]
    shut, wide = _fingers(standard, sample, closed)
    if shut is not None and wide is not None and shut > wide:
        yield (
            f"fingers are {shut:.3g} m apart where they are told to close and {wide:.3g} m where they are told "
            "to open"
        )
    elif (shut is not None and shut < (wide or _HALF_OPEN)) or (wide is not None and wide > _HALF_OPEN):
        return  # fingers do what they are told
    if low == high:
        yield (f"it is {low:.3g} throughout; {convention}")
    elif (starts := int(sum(each[0] for each in closed))) > len(closed) / 2:
        yield (f"{starts} of {len(closed)} episodes begin with it closed; {convention}")


def _fingers(
    standard: Standard, sample: DatasetSample, closed: list[npt.NDArray[np.bool_]]
) -> tuple[float | None, float | None]:
    """How far LIBERO's fingers are apart on average, in metres, where told for a while to close, and to open.

    None where there are too few such steps, or the state has no fingers.
    """
    if not isinstance(standard, Recorded | Libero) or sample.states[0].shape[1] not in _STATES_WITH_FINGERS:
        return None, None
    openings, commands = _settled(sample, closed)
    shut, wide = openings[commands], openings[~commands]
    return (
        float(shut.mean()) if len(shut) >= _ENOUGH else None,
        float(wide.mean()) if len(wide) >= _ENOUGH else None,
    )


def _settled(
    sample: DatasetSample, closed: list[npt.NDArray[np.bool_]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """How far LIBERO's fingers are apart where their command has been the same for a while, and that command."""
    openings, commands = [], []
    for state, command in zip(sample.states, closed, strict=True):
        step = np.arange(len(command))
        changes = np.diff(command, prepend=command[:1])
        since = step - np.maximum.accumulate(np.where(changes, step, 0))
        still = since >= _SETTLED
        openings.append(np.abs(state[still, -2] - state[still, -1]).astype(np.float64))
        commands.append(command[still])
    return np.concatenate(openings), np.concatenate(commands)
