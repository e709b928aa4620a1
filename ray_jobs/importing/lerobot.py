"""A policy's directory in LeRobot's layout, as its `save_pretrained` writes it, read without LeRobot.

`config.json` (`type`, features, sizes), `model.safetensors`, and `policy_preprocessor.json` and
`policy_postprocessor.json`, whose steps name the files of their statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch

from ipvla.data.normalisation import FeatureStatistics, Normalisation
from ipvla.data.statistics import Statistics
from ipvla.models.backbones.openvla_files import mapped, read_json

logger = logging.getLogger(__name__)

_KINDS: Final[Mapping[str, Normalisation]] = {
    "MEAN_STD": "normal",
    "QUANTILES": "quantiles",
    "MIN_MAX": "min_max",
}
#: Rows of a feature that is not normalised; its mask is False, and they have no part in anything.
_UNUSED: Final = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
_PICTURES: Final = "observation.images."
_STATE, _ACTION = "observation.state", "action"


@dataclass(frozen=True)
class LeRobotFiles:
    """What the files beside the weights say.

    Attributes:
        directory: theirs.
        config: `config.json`.
        statistics, normalisation: of state and action, from the two processors.
    """

    directory: Path
    config: Mapping[str, Any]
    statistics: Statistics
    normalisation: Normalisation

    @classmethod
    def read(cls, directory: Path, kinds: tuple[str, ...]) -> Self:
        """Of a policy of one of these types. ValueError, in one line, for another one, or missing files."""
        config = read_json(directory / "config.json")
        if config.get("type") not in kinds:
            raise ValueError(
                f"{directory} holds a policy of type {config.get('type')!r}; LeRobot's that can be imported are "
                f"{', '.join(kinds)}"
            )
        state, state_kind = _feature(directory, "policy_preprocessor", _STATE, _size(config, "input", _STATE))
        action, action_kind = _feature(
            directory, "policy_postprocessor", _ACTION, _size(config, "output", _ACTION)
        )
        known = {kind for kind in (state_kind, action_kind) if kind is not None}
        if len(known) > 1:
            raise ValueError(
                f"{directory} normalises states by {state_kind} and actions by {action_kind}; a policy here has "
                "one normalisation: train it with one, or make one of them IDENTITY"
            )
        return cls(directory, config, Statistics(action, state, 0, 0), known.pop() if known else "normal")

    @property
    def cameras(self) -> tuple[str, ...]:
        """Without their common prefix, and without those that stay empty."""
        names = [name for name, feature in self.config["input_features"].items() if feature["type"] == "VISUAL"]
        return tuple(name.removeprefix(_PICTURES) for name in names if ".empty_camera_" not in name)

    def step(self, processor: str, name: str) -> Mapping[str, Any] | None:
        """The settings of a processor's step, None where it has no such step."""
        return next((config for step, config, _ in _steps(self.directory, processor) if step == name), None)

    def beside_weights(self) -> dict[str, bytes]:
        """`config.json`, the processors and their tensors, by name."""
        processors = [path for path in self.directory.glob("policy_*processor*") if path.is_file()]
        return {path.name: path.read_bytes() for path in (self.directory / "config.json", *processors)}

    def times(self) -> dict[str, Any]:
        """Of `Pi0HeadConfig`: how the time is written for the model, and how training draws it."""
        self.refuse(time_sampling_beta_beta=1.0)
        ours = {
            "min_period": "min_period",
            "max_period": "max_period",
            "time_sampling_beta_alpha": "time_power",
            "time_sampling_scale": "time_scale",
            "time_sampling_offset": "time_offset",
        }
        return {name: float(self.config[theirs]) for theirs, name in ours.items() if theirs in self.config}

    def refuse(self, **unsupported: object) -> None:
        """ValueError if one of these settings of `config.json` has another value than the one given."""
        for name, value in unsupported.items():
            if self.config.get(name, value) != value:
                raise ValueError(
                    f"{self.directory}: {name} is {self.config[name]!r}; only {value!r} can be imported"
                )


def _steps(directory: Path, processor: str) -> list[tuple[str, Mapping[str, Any], str | None]]:
    """(name, settings, file of its tensors) of each step."""
    path = directory / f"{processor}.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: LeRobot's policies of before its 0.4 have their statistics among the weights; "
            "convert it with lerobot/processor/migrate_policy_normalization.py"
        )
    steps = read_json(path).get("steps", [])
    return [(step["registry_name"], step.get("config", {}), step.get("state_file")) for step in steps]


def _size(config: Mapping[str, Any], side: str, name: str) -> int:
    feature = config.get(f"{side}_features", {}).get(name)
    return 0 if feature is None else int(feature["shape"][0])


def _feature(
    directory: Path, processor: str, name: str, size: int
) -> tuple[FeatureStatistics, Normalisation | None]:
    """Statistics of the state or the action, and its normalisation; None for none."""
    kind, given = "IDENTITY", dict[str, torch.Tensor]()
    for step, config, state_file in _steps(directory, processor):
        if step in ("normalizer_processor", "unnormalizer_processor"):
            kind = config.get("norm_map", {}).get("STATE" if name == _STATE else "ACTION", kind)
            given = mapped(directory / state_file) if state_file else {}
    tensors = {row: given.get(f"{name}.{row}") for row in _UNUSED}
    rows = {row: x.float().flatten().numpy() for row, x in tensors.items() if x is not None}
    if kind != "IDENTITY" and not rows:
        logger.warning("%s has no statistics of %s: it is not normalised", directory, name)
        kind = "IDENTITY"
    if kind != "IDENTITY" and kind not in _KINDS:
        raise ValueError(f"{directory} normalises {name} by {kind}; known are {', '.join(_KINDS)} and IDENTITY")
    filled = {
        row: np.full(size, value if kind == "IDENTITY" else np.nan, np.float32) for row, value in _UNUSED.items()
    }
    filled |= rows if kind != "IDENTITY" else {}
    if wrong := [row for row, values in filled.items() if values.shape != (size,)]:
        raise ValueError(
            f"{directory}: the {wrong[0]} of {name} has not {size} numbers, which config.json says it has"
        )
    mask = np.full(size, kind != "IDENTITY")
    return FeatureStatistics(**filled, mask=mask), _KINDS.get(kind)
