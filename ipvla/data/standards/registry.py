"""Which standard a dataset has, by its name or by its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from ipvla.contract import Contract
from ipvla.data.recording import Recording
from ipvla.data.rlds.format import image_key
from ipvla.data.source import DatasetError, EpisodeSource, Feature
from ipvla.data.standards.generic import StandardConfig, flags, lerobot
from ipvla.data.standards.libero import JOINTS, LIBERO_DATASETS, LIBERO_INNER_NAMES, Libero, libero, recorded
from ipvla.data.standards.open_x import (
    BRIDGE_DATASETS,
    DROID_DATASETS,
    DROID_INNER_NAME,
    FRACTAL_DATASETS,
    Bridge,
    bridge,
    droid,
    fractal,
)
from ipvla.data.standards.standard import Standard

#: Datasets of other hands by their public names.
STANDARDS: Final[Mapping[str, Callable[[str], Standard]]] = {
    **dict.fromkeys(LIBERO_DATASETS, libero),
    **dict.fromkeys(BRIDGE_DATASETS, bridge),
    **dict.fromkeys(FRACTAL_DATASETS, fractal),
    **dict.fromkeys(DROID_DATASETS, droid),
}
#: The same by the names inside their metadata, and the feature that distinguishes them from others of that name.
_INNER: Final[Mapping[str, tuple[Callable[[str], Standard], str]]] = {
    **dict.fromkeys(LIBERO_INNER_NAMES, (libero, JOINTS)),
    DROID_INNER_NAME: (droid, "action_dict/cartesian_velocity"),
}


def standard_of(
    source: EpisodeSource,
    config: StandardConfig | None = None,
    *,
    skip_noops: bool = False,
    padded_state: bool = False,
) -> Standard:
    """The configured standard of a dataset, or else what its name and features say, adjusted.

    Raises:
        DatasetError: as `StandardConfig.build`, `standard_for` and `adjusted`.
    """
    if config is None and (terms := Recording.of(source).terms) is not None:
        config = _recorded_on(terms, source.features)
    if config is not None:
        standard: Standard = config.build(source.name, source.features)
    else:
        standard = standard_for(source.name, source.features, source.inner_name)
    return adjusted(standard, skip_noops=skip_noops, padded_state=padded_state)


def standard_for(name: str, features: Mapping[str, Feature], inner_name: str = "") -> Standard:
    """The standard of a known name, else of LIBERO's layout, which this project's own datasets have, or LeRobot's.

    Args:
        name: the dataset's, first choice.
        features: of its steps.
        inner_name: what the dataset's metadata call it, second choice.

    Raises:
        DatasetError: the dataset of a known name lacks features, or the meaning of its features is unknown.
    """
    known = name if name in STANDARDS else inner_name
    if known in STANDARDS:
        standard = STANDARDS[known](name)
        missing = standard.missing(features)
        if missing:
            raise DatasetError(
                f"{known} lacks {', '.join(missing)}, which the dataset of that name has; it has "
                f"{', '.join(sorted(features))}. Rename the dataset, or configure its standard: {flags(features)}"
            )
        return standard
    for each in (name, inner_name):
        if each in _INNER and _INNER[each][1] in features:
            standard = _INNER[each][0](name)
            if not standard.missing(features):
                return standard
    layout = recorded(name, features) or lerobot(name, features)
    if layout is None:
        raise DatasetError(
            f"the meaning of {name}'s features is unknown: {_listed(features)}. Configure its standard, "
            f"for example: {flags(features)} (`--standard...` for jobs that only read data). "
            f"Known by name are {', '.join(STANDARDS)}; LIBERO's layout has actions of 7 numbers"
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


def _recorded_on(terms: Contract, features: Mapping[str, Feature]) -> StandardConfig:
    """The standard of a dataset that this project recorded on these terms."""
    named = {f"observation/{image_key(camera)}": camera for camera in terms.cameras}
    cameras = {camera: path for path, camera in named.items() if path in features}
    return StandardConfig(
        cameras or None,
        gripper=terms.gripper,
        absolute=terms.action == "joints",
        orientation=terms.pictures.orientation,
        control_hz=terms.control_hz,
    )


def _listed(features: Mapping[str, Feature]) -> str:
    shapes = {path: f" {list(f.shape)}" if f.kind == "number" else "" for path, f in features.items()}
    return ", ".join(f"{path}{shapes[path]}" for path in sorted(features))
