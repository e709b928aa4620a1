"""How recorded grippers become openings, 1 open and 0 closed: the convention "open_is_one" of `ipvla.contract`.

The three conversions of recorded grippers follow the definitions of OpenVLA's pipeline
(github.com/openvla/openvla, prismatic/vla/datasets/rlds/utils/data_utils.py).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]

_OPEN, _CLOSED = 0.95, 0.05
_PRESSED = 0.1


def binarised(opening: FloatArray) -> FloatArray:
    """Exactly 0 or 1 from continuous openings, float32 [T] each.

    More than 0.95 is 1, less than 0.05 is 0. A value between them becomes the next of these; after the last one,
    the episode's last opening, unchanged.
    """
    certain = (opening > _OPEN) | (opening < _CLOSED)
    place = np.where(certain, np.arange(len(opening)), len(opening))
    following = np.minimum.accumulate(place[::-1])[::-1]
    reached = np.append((opening > _OPEN).astype(np.float32), opening[-1:])
    return np.asarray(reached[following], np.float32)


def opening_from_closing(closing: FloatArray) -> FloatArray:
    """1 open and 0 closed from commands, float32 [T] each: more than 0.1 closes, less than -0.1 opens.

    Before the first command the gripper is in the state that this command ends. Without any it is open.
    """
    command = np.where(closing < -_PRESSED, 1, np.where(closing > _PRESSED, 0, -1))
    given = np.nonzero(command >= 0)[0]
    before = 1 - command[given[0]] if len(given) else 1
    latest = np.maximum.accumulate(np.where(command >= 0, np.arange(len(closing)) + 1, 0))
    return np.asarray(np.concatenate([[before], command])[latest], np.float32)


def opening_from_environment(gripper: FloatArray) -> FloatArray:
    """1 open and 0 closed from -1 open and +1 closed, float32 [T] each."""
    return np.asarray(1 - gripper.clip(0, 1), np.float32)
