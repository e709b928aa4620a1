"""Statistics of one vector feature, and the normalisations that they define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # readers of episodes do not need it: 150 MB and two seconds
    import torch

Array = TypeVar("Array", npt.NDArray[np.floating[Any]], "torch.Tensor")

#: OpenVLA's three (prismatic/vla/datasets/rlds/utils/data_utils.py): the 1 % and 99 % quantiles onto [-1, 1] and
#: clipped; the minimum and maximum onto [-1, 1]; mean 0 and standard deviation 1, not clipped.
Normalisation: TypeAlias = Literal["bounds_q99", "bounds", "normal"]
NORMALISATIONS: Final[tuple[str, ...]] = get_args(Normalisation)

#: Keeps a division by a span of 0 finite.
_EPSILON = 1e-8
#: The rows that a normalisation needs.
_ROWS: Final = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max"), "normal": ("mean", "std")}


@dataclass(frozen=True)
class FeatureStatistics:
    """Per-dimension statistics of one vector feature, each float32 [D].

    Attributes:
        mean, std, min, max, q01, q99: over all control steps, in the feature's units; NaN where a file had none.
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

    def require(self, kind: Normalisation) -> None:
        """ValueError if these statistics lack what a normalisation needs."""
        missing = [row for row in _ROWS[kind] if np.isnan(getattr(self, row)).any()]
        if missing:
            known = [k for k, rows in _ROWS.items() if not any(np.isnan(getattr(self, r)).any() for r in rows)]
            raise ValueError(
                f"normalisation is {kind!r}, and the statistics have no {' and '.join(missing)}; "
                f"choose {' or '.join(known)}, or compute the statistics from the dataset"
            )

    def normalise(self, x: Array, kind: Normalisation = "bounds_q99") -> Array:
        """[..., D] in units -> [..., D] as `kind` says; constant dimensions become 0."""
        a, b, scaled, fixed = (_like(v, x) for v in (*self._rows(kind), self.mask, self._fixed(kind)))
        y = (x - a) / (b + _EPSILON) if kind == "normal" else (2 * (x - a) / (b - a + _EPSILON) - 1).clip(-1, 1)
        where = _where(x)
        result: Array = where(fixed, 0.0, where(scaled, y, x))
        return result

    def denormalise(self, y: Array, kind: Normalisation = "bounds_q99") -> Array:
        """The inverse where nothing was clipped; constant dimensions get their exact constant, whatever `y` is."""
        a, b, low, scaled, constant = (
            _like(v, y) for v in (*self._rows(kind), self.min, self.mask, self.constant)
        )
        x = y * (b + _EPSILON) + a if kind == "normal" else 0.5 * (y + 1) * (b - a) + a
        where = _where(y)
        result: Array = where(constant, low, where(scaled, x, y))
        return result

    def _rows(self, kind: Normalisation) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        first, second = _ROWS[kind]
        return getattr(self, first), getattr(self, second)

    def _fixed(self, kind: Normalisation) -> npt.NDArray[np.bool_]:
        if kind != "bounds_q99":
            return self.constant
        # Equal quantiles with rare outliers carry no scale: the formula would send the usual value to -1.
        return np.asarray(self.constant | (self.mask & (self.q01 == self.q99)))


def _like(constants: npt.NDArray[Any], x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return constants
    import torch

    return torch.from_numpy(constants).to(x.device)


def _where(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.where
    import torch

    return torch.where
