"""Which standard a dataset has, by its name or by its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from ipvla.data.source import DatasetError, Feature
from ipvla.data.standards.bridge import BRIDGE_DATASETS, Bridge, bridge
from ipvla.data.standards.droid import DROID_DATASETS, droid
from ipvla.data.standards.fractal import FRACTAL_DATASETS, fractal
from ipvla.data.standards.lerobot import lerobot
from ipvla.data.standards.libero import LIBERO_DATASETS, Libero, libero
from ipvla.data.standards.recorded import other_robot, recorded
from ipvla.data.standards.standard import Standard

#: Datasets of other hands by their public names.
STANDARDS: Final[Mapping[str, Callable[[str], Standard]]] = {
    **dict.fromkeys(LIBERO_DATASETS, libero),
    **dict.fromkeys(BRIDGE_DATASETS, bridge),
    **dict.fromkeys(FRACTAL_DATASETS, fractal),
    **dict.fromkeys(DROID_DATASETS, droid),
}


def standard_for(name: str, features: Mapping[str, Feature]) -> Standard:
    """The standard of a known name, else of LIBERO's layout, which this project's own datasets have, or LeRobot's.

    Raises:
        DatasetError: the dataset of a known name lacks features, or nothing tells what its features mean.
    """
    if name in STANDARDS:
        standard = STANDARDS[name](name)
        missing = standard.missing(features)
        if missing:
            raise DatasetError(
                f"{name} lacks {', '.join(missing)}, which the dataset of that name has; it has "
                f"{', '.join(sorted(features))}. Rename the dataset, or configure its standard"
            )
        return standard
    layout = recorded(name, features) or other_robot(name, features) or lerobot(name, features)
    if layout is None:
        raise DatasetError(
            f"nothing tells what the features of {name} mean: {', '.join(sorted(features))}. Configure its "
            "standard: name the features of cameras, action, state and language, as StandardConfig does. "
            f"Known by name are {', '.join(STANDARDS)}"
        )
    return layout


def adjusted(standard: Standard, *, skip_noops: bool = False, padded_state: bool = False) -> Standard:
    """The same standard with steps that do nothing left out, or with OpenVLA's padding of the state.

    Raises:
        DatasetError: the state of this dataset is padded by nobody.
    """
    if padded_state:
        if not isinstance(standard, Libero | Bridge):
            raise DatasetError(
                f"padded_state is true, and {standard.name!r} is none of the datasets whose state OpenVLA pads, "
                "LIBERO's and Bridge; set it to false"
            )
        standard = replace(standard, padded_state=True)
    return replace(standard, skip_noops=True) if skip_noops else standard
