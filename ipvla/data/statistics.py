"""Dataset statistics in OpenVLA's schema, and the BOUNDS_Q99 normalisation that they define."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

logger = logging.getLogger(__name__)

Array = TypeVar("Array", npt.NDArray[np.floating[Any]], torch.Tensor)

#: Below this many transitions the 1 % and 99 % quantiles are poor estimates.
_FEW_TRANSITIONS = 5_000


@dataclass(frozen=True)
class FeatureStatistics:
    """Per-dimension statistics of one vector feature, each float32 [D].

    Attributes:
        mean, std, min, max, q01, q99: over all control steps, in the feature's units.
        mask: bool [D], True where the feature is normalised; False passes it through (the gripper).
    """

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    min: npt.NDArray[np.float32]
    max: npt.NDArray[np.float32]
    q01: npt.NDArray[np.float32]
    q99: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]

    @classmethod
    def compute(cls, values: npt.NDArray[np.floating[Any]], mask: npt.NDArray[np.bool_]) -> Self:
        """From [N, D] values, one row per control step, N >= 1."""
        x = np.asarray(values, np.float64)
        rows = {
            "mean": x.mean(0),
            "std": x.std(0),
            "min": x.min(0),
            "max": x.max(0),
            "q01": np.quantile(x, 0.01, axis=0),
            "q99": np.quantile(x, 0.99, axis=0),
        }
        return cls(**{name: row.astype(np.float32) for name, row in rows.items()}, mask=mask)

    @property
    def dim(self) -> int:
        return len(self.mask)

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """bool [D], True where the feature never changed: there is nothing to predict."""
        return np.asarray(self.min == self.max)

    def normalise(self, x: Array) -> Array:
        """[..., D] in units -> [..., D], q01..q99 onto [-1, 1] and clipped; constant dimensions become 0."""
        q01, q99, scaled, fixed = (_like(v, x) for v in (self.q01, self.q99, self.mask, self._degenerate))
        y = (2 * (x - q01) / (q99 - q01 + 1e-8) - 1).clip(-1, 1)
        where = _where(x)
        result: Array = where(fixed, 0.0, where(scaled, y, x))
        return result

    def denormalise(self, y: Array) -> Array:
        """The inverse on [q01, q99]; constant dimensions get their exact constant, whatever `y` is."""
        q01, q99, low, scaled, constant = (
            _like(v, y) for v in (self.q01, self.q99, self.min, self.mask, self.constant)
        )
        where = _where(y)
        result: Array = where(constant, low, where(scaled, 0.5 * (y + 1) * (q99 - q01) + q01, y))
        return result

    @property
    def _degenerate(self) -> npt.NDArray[np.bool_]:
        # Equal quantiles with rare outliers carry no scale: the formula would send the usual value to -1.
        return np.asarray(self.constant | (self.mask & (self.q01 == self.q99)))


@dataclass(frozen=True)
class Statistics:
    """Statistics of a dataset's actions [A] and proprioception [P], and its size."""

    action: FeatureStatistics
    proprio: FeatureStatistics
    num_transitions: int
    num_trajectories: int

    @classmethod
    def compute(
        cls, actions: Sequence[npt.NDArray[np.float32]], proprios: Sequence[npt.NDArray[np.float32]]
    ) -> Self:
        """Over all control steps of all episodes: one [T, A] and one [T, P] array per episode.

        The action's last dimension is the gripper, which is already -1 or +1 and is left unscaled.
        """
        action, proprio = np.concatenate(actions), np.concatenate(proprios)
        if len(action) < _FEW_TRANSITIONS:
            logger.warning("statistics rest on only %d transitions: q01 and q99 are rough", len(action))
        arm = np.arange(action.shape[1]) < action.shape[1] - 1
        return cls(
            action=FeatureStatistics.compute(action, arm),
            proprio=FeatureStatistics.compute(proprio, np.ones(proprio.shape[1], np.bool_)),
            num_transitions=len(action),
            num_trajectories=len(actions),
        )

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """bool [A], True on action dimensions that never changed: the loss ignores them."""
        return self.action.constant

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` gives back equal statistics."""
        return {
            key: {name: row.tolist() for name, row in value.items()} if isinstance(value, dict) else value
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
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps({name: self.to_dict()}, indent=2))
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path, expected_action_dim: int | None = None) -> Self:
        """Reads a statistics file of one dataset.

        Raises:
            ValueError: the file is missing or not in OpenVLA's schema, or its action size is not the expected one.
        """
        try:
            datasets = json.loads(path.read_text())
            (values,) = datasets.values()
            statistics = cls.from_dict(values)
        except FileNotFoundError:
            raise ValueError(f"statistics file {path} does not exist; collect the dataset again") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold one dataset's statistics in OpenVLA's schema ({error!r}); "
                "delete it or collect the dataset again"
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
    return FeatureStatistics(**rows, mask=mask)


def _like(constants: npt.NDArray[Any], x: Any) -> Any:
    return torch.from_numpy(constants).to(x.device) if isinstance(x, torch.Tensor) else constants


def _where(x: Any) -> Any:
    return torch.where if isinstance(x, torch.Tensor) else np.where
