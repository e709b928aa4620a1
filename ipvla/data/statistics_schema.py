"""Which part of a statistics file is one dataset's: OpenVLA's files, its models' `config.json`, openpi's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: openpi's `norm_stats.json` has its two features under these names (github.com/Physical-Intelligence/openpi,
#: src/openpi/shared/normalize.py).
_OPENPI = {"action": "actions", "proprio": "state"}
_FEATURES = tuple(_OPENPI)


class UnknownDatasetError(Exception):
    """A file has statistics of other datasets; the message goes on from the file's name."""


def dataset_values(content: Any, name: str | None) -> Mapping[str, Any]:
    """One dataset's statistics in OpenVLA's schema, unchecked, from a file's JSON content.

    OpenVLA's own cache has one dataset's alone, without its name.

    openpi's files have no minimum and maximum and tell no counts: these become null and 0. All their dimensions
    are normalised.

    Args:
        name: the dataset's; None for the only one. openpi's files have one and tell no name.

    Raises:
        UnknownDatasetError: there is no dataset of that name, or none was named and there are several.
        AttributeError, KeyError, TypeError, ValueError: the content is in none of these schemas.
    """
    datasets = content.get("norm_stats", content)
    if set(_OPENPI.values()) <= set(datasets):
        features = {ours: _from_openpi(datasets[theirs]) for ours, theirs in _OPENPI.items()}
        return {**features, "num_transitions": 0, "num_trajectories": 0}
    if set(_FEATURES) <= set(datasets):
        return {"num_transitions": 0, "num_trajectories": 0, **datasets}
    if {"mean", "std"} <= set(datasets):
        raise UnknownDatasetError(
            f"holds {', '.join(datasets)} of one feature, not the statistics of a dataset: these are of action "
            "and of proprio (OpenVLA), or of actions and of state (openpi)"
        )
    if name is None:
        if len(datasets) > 1:
            raise UnknownDatasetError(f"holds statistics of several datasets; name one of {', '.join(datasets)}")
        (name,) = datasets
    if name not in datasets:
        raise UnknownDatasetError(f"holds no statistics of {name!r}; it has {', '.join(datasets)}")
    values: Mapping[str, Any] = datasets[name]
    return values


def _from_openpi(feature: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [None] * len(feature["mean"])
    quantiles = {row: feature.get(row) or unknown for row in ("q01", "q99")}
    return {"mean": feature["mean"], "std": feature["std"], **quantiles, "min": unknown, "max": unknown}
