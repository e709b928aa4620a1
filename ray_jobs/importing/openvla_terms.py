"""On which terms an OpenVLA checkpoint observes and acts: what the name and the numbers of its statistics tell."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from ipvla.contract import STATE_SIZES, Contract, Pictures
from ipvla.data.normalisation import FeatureStatistics
from ipvla.data.standards.libero import Libero
from ipvla.data.standards.open_x import Bridge
from ipvla.data.standards.registry import STANDARDS
from ipvla.data.standards.standard import Standard
from ipvla.data.statistics import Statistics

logger = logging.getLogger(__name__)
_CAMERAS: Final = ("agentview", "robot0_eye_in_hand", "third")
#: Numbers of Bridge's state, position 3, roll, pitch, yaw and gripper, and the same as OpenVLA pads it.
_BRIDGE, _BRIDGE_PADDED = 7, 8
#: Where the 0 stands: behind the pose's six numbers.
_PAD: Final = 6


def known_standard(key: str) -> Standard | None:
    """The dataset's by its name, or by OpenVLA's name of its copy without no-ops; None if neither is known."""
    for name in (key, f"{key}_no_noops"):
        if name in STANDARDS:
            return STANDARDS[name](name)
    return None


def recorded_terms(key: str, statistics: Statistics) -> Contract:
    """The terms of dataset `key`; in OpenVLA's datasets 1 is an open gripper, where it is not normalised.

    Of LIBERO and Bridge the statistics tell whether the state has OpenVLA's padding. A state of Bridge's that they
    describe otherwise is "unknown", and a warning says so.
    """
    size, state = statistics.action.dim, statistics.proprio.dim
    standard = known_standard(key)
    if standard is not None:
        if isinstance(standard, Libero) and state == STATE_SIZES["hand_padded"]:  # OpenVLA's own, not OFT's
            standard = replace(standard, padded_state=True)
        known = standard.contract(state)
        layout = known.state if STATE_SIZES.get(known.state, state) == state else "unknown"
        if isinstance(standard, Bridge) and state and not _is_bridge(statistics.proprio):
            layout = "unknown"
            logger.warning(
                "the statistics of %s describe a state of %d numbers, which is neither Bridge's own, of %d, nor "
                "OpenVLA's, of %d of which number %d is always 0; set --terms or --statistics",
                key, state, _BRIDGE, _BRIDGE_PADDED, _PAD + 1,
            )  # fmt: skip
        cameras = tuple(standard.cameras)
        return replace(known, cameras=cameras, action_size=size, state=layout, state_size=state, clipped=False)
    hand = size == 7 and not statistics.action.mask[-1]
    return Contract(
        _CAMERAS[:1],
        Pictures("unknown"),
        gripper="open_is_one" if hand else "none",
        action="hand" if hand else "unknown",
        action_size=size,
        clipped=False,
        state="unknown",
        state_size=state,
        control_hz=None,
    )


def state_is_padded(terms: Contract, state: FeatureStatistics) -> bool:
    """Whether data must have OpenVLA's padding (`data.padded_state`) to be like those of these terms."""
    return terms.state == "hand_padded" or (terms.state == "other" and _is_padded_bridge(state))


def _is_bridge(state: FeatureStatistics) -> bool:
    return state.dim == _BRIDGE or _is_padded_bridge(state)


def _is_padded_bridge(state: FeatureStatistics) -> bool:
    """Of its 8 numbers the 7th alone never differed from 0."""
    if state.dim != _BRIDGE_PADDED:
        return False
    never = (state.min == 0) & (state.max == 0)
    return bool(never[_PAD] and never.sum() == 1)
