"""Which steps of an episode do something."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Norm of a hand's motion below which it stands still, in the action's units.
THRESHOLD = 1e-4


def moving_steps(action: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """bool [T], False where the hand stands still and the gripper is as in the last step that stays.

    Steps before the hand first moves are left out, whatever the gripper does. The definition is OpenVLA-OFT's
    (github.com/moojink/openvla-oft, experiments/robot/libero/regenerate_libero_dataset.py), which replayed
    the remaining actions in a simulator; recorded pictures still show the scene at the time of the recording.

    Args:
        action: float32 [T, A], unnormalised; the last dimension is the gripper.
    """
    moves = np.linalg.norm(action[:, :-1], axis=1) >= THRESHOLD
    # A step that is left out has the gripper of the one before it: comparing neighbours suffices.
    changes = np.diff(action[:, -1], prepend=action[:1, -1]) != 0
    started = np.logical_or.accumulate(moves)
    return np.asarray((moves | changes) & started)
