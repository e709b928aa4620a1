"""What a chunk of actions holds where it reaches past its episode's end."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

#: "mask": the last action repeats and is no target. "openvla": absolute dimensions repeat, relative ones become 0,
#: and all are targets. "truncate": a chunk that reaches past the end has no targets at all.
PastEnd: TypeAlias = Literal["mask", "openvla", "truncate"]
PAST_END: Final[tuple[str, ...]] = get_args(PastEnd)


def past_the_end(
    target: npt.NDArray[np.float32],
    inside: npt.NDArray[np.bool_],
    how: PastEnd,
    absolute: tuple[bool, ...],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Targets and which of them count.

    "openvla" does what OpenVLA's pipeline does (prismatic/vla/datasets/rlds/traj_transforms.py), which cuts chunks
    after it has normalised: its 0 is the middle of the normalised range, not a motion of 0. "truncate" does what
    OpenVLA-OFT does, which has no windows at an episode's last C - 1 steps: they are seen but not trained on, and
    an episode shorter than a chunk has no targets.

    Args:
        target: float32 [..., C, A], normalised, the episode's last action past its end.
        inside: bool [..., C], False past the episode's end.
        absolute: bool [A], action dimensions that give a position rather than a motion.

    Returns:
        float32 [..., C, A], and bool [..., C], True where it is a target.
    """
    if how == "openvla":
        stays = inside[..., None] | np.array(absolute)
        return np.where(stays, target, np.float32(0)), np.ones_like(inside)
    if how == "truncate":
        return target, np.broadcast_to(inside[..., -1:], inside.shape)
    return target, inside
