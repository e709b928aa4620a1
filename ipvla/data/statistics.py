"""Dataset statistics, computed, written in OpenVLA's schema and read from others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ipvla.data.normalisation import FeatureStatistics
from ipvla.files import one_line, read_record, write_text

logger = logging.getLogger(__name__)

#: Below this many transitions the 1 % and 99 % quantiles are poor estimates.
FEW_TRANSITIONS = 5_000
#: openpi's `norm_stats.json` has its two features under these names (github.com/Physical-Intelligence/openpi,
#: src/openpi/shared/normalize.py).
_OPENPI = {"action": "actions", "proprio": "state"}
_FEATURES = tuple(_OPENPI)


class UnknownDatasetError(Exception):
    """A file has statistics of other datasets; the message goes on from the file's name."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of a dataset's actions [A] and proprioception [P], and its size."""

    action: FeatureStatistics
    proprio: FeatureStatistics
    num_transitions: int
    num_trajectories: int

    @classmethod
    def compute(
        cls,
        actions: Sequence[npt.NDArray[np.float32]],
        proprios: Sequence[npt.NDArray[np.float32]],
        normalised: Sequence[bool] | None = None,
    ) -> Self:
        """Over all control steps of all episodes: one [T, A] and one [T, P] array per episode.

        Args:
            normalised: bool [A], action dimensions that are scaled; None for all but the last, the gripper.
        """
        action, proprio = np.concatenate(actions), np.concatenate(proprios)
        warn_of_few(len(action))
        if normalised is None:
            normalised = [True] * (action.shape[1] - 1) + [False]
        return cls(
            action=FeatureStatistics.compute(action, np.array(normalised, np.bool_)),
            proprio=FeatureStatistics.compute(proprio, np.ones(proprio.shape[1], np.bool_)),
            num_transitions=len(action),
            num_trajectories=len(actions),
        )

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """bool [A], True on action dimensions that never changed: the loss ignores them."""
        return self.action.constant

    def to_dict(self) -> dict[str, Any]:
        """JSON values, null for NaN; `from_dict` gives back equal statistics."""
        return {
            key: {name: _numbers(row) for name, row in value.items()} if isinstance(value, dict) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(
            action=_feature(values["action"]),
            proprio=_feature(values["proprio"]),
            num_transitions=int(values["num_transitions"]),
            num_trajectories=int(values["num_trajectories"]),
        )

    def save(self, path: Path, name: str) -> None:
        """Writes `{name: {action, proprio, num_transitions, num_trajectories}}`, replacing the file at once."""
        write_text(path, json.dumps({name: self.to_dict()}, indent=2))

    @classmethod
    def load(cls, path: Path, expected_action_dim: int | None = None, name: str | None = None) -> Self:
        """Reads a statistics file of OpenVLA or openpi, or the `norm_stats` of OpenVLA's `config.json`.

        Args:
            name: the dataset's, in a file of several; None for the only one.

        Raises:
            ValueError: the file is missing or in no such schema, has no such dataset, or its action size is not
                the expected one.
        """
        try:
            values = dataset_values(read_record(path), name)
            statistics = cls.from_dict(values)
        except FileNotFoundError:
            raise ValueError(f"statistics file {path} does not exist; collect the dataset again") from None
        except UnknownDatasetError as error:
            raise ValueError(f"{path} {error}") from None
        except (OSError, AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold one dataset's statistics in OpenVLA's schema or openpi's "
                f"({one_line(error)}); delete it or collect the dataset again"
            ) from None
        if expected_action_dim is not None and statistics.action.dim != expected_action_dim:
            raise ValueError(
                f"{path} has statistics for {statistics.action.dim} action dimensions, the episodes have "
                f"{expected_action_dim}; use their own statistics, or delete the file to have them computed anew"
            )
        return statistics


def _feature(values: Mapping[str, Any]) -> FeatureStatistics:
    rows = {name: np.asarray(values[name], np.float32) for name in ("mean", "std", "min", "max", "q01", "q99")}
    # OpenVLA's files leave the mask out where everything is normalised.
    mask = np.asarray(values.get("mask", np.ones(len(rows["q01"]))), np.bool_)
    if {row.shape for row in rows.values()} != {mask.shape}:
        raise ValueError("rows of different lengths")
    if mask.ndim != 1:
        raise ValueError(f"rows of shape {mask.shape}, not lists of numbers")
    if any(np.isinf(row).any() for row in rows.values()):
        raise ValueError("a number that is not finite")
    return FeatureStatistics(**rows, mask=mask)


def _numbers(row: npt.NDArray[Any]) -> list[Any]:
    return [None if unknown else value for value, unknown in zip(row.tolist(), np.isnan(row), strict=True)]


def warn_of_few(num_transitions: int) -> None:
    """Says so in the log if quantiles of so few control steps are poor estimates."""
    if num_transitions < FEW_TRANSITIONS:
        logger.warning("statistics rest on only %d transitions: q01 and q99 are rough", num_transitions)


def dataset_values(content: Any, name: str | None) -> Mapping[str, Any]:
    """One dataset's statistics in OpenVLA's schema, unchecked, from a file's JSON content.

    OpenVLA's own cache has one dataset's alone, without its name.

    openpi's files have no minimum and maximum and no counts: these become null and 0. All their dimensions
    are normalised.

    Args:
        name: the dataset's; None for the only one. openpi's files have one, without a name.

    Raises:
        UnknownDatasetError: there is no dataset of that name, or none was named and there are several.
        AttributeError, KeyError, TypeError, ValueError: the content is in none of these schemas.
    """
    datasets = content.get("norm_stats", content)
    if set(_OPENPI.values()) <= set(datasets):
        features = {feature: _from_openpi(datasets[openpi]) for feature, openpi in _OPENPI.items()}
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
