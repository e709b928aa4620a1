"""Does a dataset's gripper follow the convention of its standard?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from evaluators.dataset_sample import DatasetSample
from ipvla.contract import environment_gripper
from ipvla.data.normalisation import FeatureStatistics
from ipvla.data.standards import Standard
from ipvla.data.standards.libero import Libero, Recorded

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


def suspicions(standard: Standard, statistics: FeatureStatistics, sample: DatasetSample) -> Iterator[str]:
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
