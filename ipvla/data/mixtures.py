"""Mixtures of datasets: how much each weighs, and how often each of its episodes is seen in an epoch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ipvla.choices import nearest
from ipvla.data.source import DatasetError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """Datasets by name with their weights.

    A weight w says how often each episode of a dataset is seen in an epoch: on average w times, always as a whole.
    Among all control steps of an epoch a dataset of N_d steps thus has the share w_d N_d / sum_e w_e N_e, which is
    what OpenVLA's weights mean too (`balance_weights` in prismatic/vla/datasets/rlds/dataset.py). Weights that are
    all twice as large leave the shares as they are and make an epoch twice as long.

    Attributes:
        weights: dataset -> w, finite and more than 0.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("a mixture has no datasets; name at least one with its weight")
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"the weight of {name} is {weight}; give a number above 0, or leave the dataset out"
                )

    def repeats(self, lengths: Mapping[str, IntArray], seed: int, epoch: int) -> dict[str, IntArray]:
        """How often each episode is seen in an epoch.

        floor(w) times, and once more with probability w - floor(w). The draw depends on seed, epoch, dataset and
        episode alone, not on what other datasets there are; whole weights leave nothing to chance.

        Args:
            lengths: dataset -> int64 [E], control steps per episode; episodes of 0 steps are never seen.
            seed, epoch: non-negative.

        Returns:
            dataset -> int64 [E], in the mixture's order.
        """
        return {
            name: np.where(lengths[name] > 0, _repeats(name, weight, len(lengths[name]), seed, epoch), 0)
            for name, weight in self.weights.items()
        }


def mixture_named(name: str) -> Mixture:
    """One of `OXE_MIXTURES`. DatasetError that suggests others if there is none of that name."""
    if name not in OXE_MIXTURES:
        close = nearest(name, OXE_MIXTURES, most=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(OXE_MIXTURES)}"
        raise DatasetError(f"there is no mixture {name!r}; {remedy} Or give datasets with their weights")
    return Mixture(OXE_MIXTURES[name])


def _repeats(name: str, weight: float, episodes: int, seed: int, epoch: int) -> IntArray:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    draw = np.random.default_rng((seed, epoch, key)).random(episodes)
    whole = math.floor(weight)
    return whole + (draw < weight - whole).astype(np.int64)


#: Those of Open X-Embodiment with the names and weights that OpenVLA published (github.com/openvla/openvla,
#: github.com/moojink/openvla-oft, prismatic/vla/datasets/rlds/oxe/mixtures.py). Those of their datasets that
#: `ipvla.data.standards` does not know by name need a standard that is configured.
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
