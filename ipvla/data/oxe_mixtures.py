"""Open X-Embodiment's mixtures under the names, and with the weights, that OpenVLA published.

From github.com/openvla/openvla and github.com/moojink/openvla-oft, prismatic/vla/datasets/rlds/oxe/mixtures.py.
Those of their datasets that `ipvla.data.standards` does not know by name need a standard that is configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_LIBERO = ("libero_spatial_no_noops", "libero_object_no_noops", "libero_goal_no_noops", "libero_10_no_noops")
_CONVERTED = "_converted_externally_to_rlds"

_RTX = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_orig": 1.0,
    "taco_play": 2.0,
    "jaco_play": 2.0,
    "berkeley_cable_routing": 3.0,
    "roboturk": 1.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 1.0,
    "toto": 1.0,
}

_MAGIC_SOUP = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_orig": 1.0,
    "taco_play": 2.0,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "toto": 1.0,
    "language_table": 0.1,
    f"stanford_hydra_dataset{_CONVERTED}": 2.0,
    f"austin_buds_dataset{_CONVERTED}": 1.0,
    f"nyu_franka_play_dataset{_CONVERTED}": 3.0,
    f"furniture_bench_dataset{_CONVERTED}": 0.1,
    f"ucsd_kitchen_dataset{_CONVERTED}": 2.0,
    f"austin_sailor_dataset{_CONVERTED}": 1.0,
    f"austin_sirius_dataset{_CONVERTED}": 1.0,
    f"dlr_edan_shared_control{_CONVERTED}": 1.0,
    f"iamlab_cmu_pickup_insert{_CONVERTED}": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}

OXE_MIXTURES: Final[Mapping[str, Mapping[str, float]]] = {
    "bridge": {"bridge_orig": 1.0},
    "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
    "rtx": _RTX,
    "oxe_magic_soup": _MAGIC_SOUP,
    "oxe_magic_soup_plus": {**_MAGIC_SOUP, "bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06},
    **{name: {name: 1.0} for name in _LIBERO},
    "libero_4_task_suites_no_noops": dict.fromkeys(_LIBERO, 1.0),
}
