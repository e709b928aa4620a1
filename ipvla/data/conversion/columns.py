"""How the features of one format are named in another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ipvla.data.lerobot.format import INDEX_FEATURES, TASK
from ipvla.data.rlds.format import INSTRUCTIONS
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory

_CAMERA, _OBSERVATION = "observation.images.", "observation/"
#: RLDS's own names of what LeRobot calls otherwise; single numbers.
_NEXT = {"reward": "next.reward", "is_terminal": "next.done"}
_RLDS_NAMES = {name: path for path, name in _NEXT.items()}
_SCALARS = (*_NEXT, "discount")
_FLAGS = ("is_first", "is_last")


@dataclass(frozen=True)
class Column:
    """One feature: its name in the source, and its name and shape in the target."""

    source: str
    target: str
    feature: Feature


@dataclass(frozen=True)
class Columns:
    """The features of a target, and how a source's episode becomes one of it.

    Attributes:
        columns: those that come from the source.
        flags: adds RLDS's `is_first` and `is_last`, and to the metadata `file_path`, by which its tools tell
            episodes apart.
    """

    columns: tuple[Column, ...]
    flags: bool

    @property
    def features(self) -> dict[str, Feature]:
        """By the target's names."""
        flags = dict.fromkeys(_FLAGS, Feature("number", (), "bool")) if self.flags else {}
        return {column.target: column.feature for column in self.columns} | flags

    def apply(self, trajectory: Trajectory) -> Trajectory:
        """The episode under the target's names. DatasetError if it lacks a feature."""
        length = len(trajectory)
        steps = {column.target: _values(trajectory, column) for column in self.columns}
        if not self.flags:
            return Trajectory(steps, trajectory.where, trajectory.metadata)
        steps |= {"is_first": np.arange(length) == 0, "is_last": np.arange(length) == length - 1}
        return Trajectory(steps, trajectory.where, {"file_path": trajectory.where, **trajectory.metadata})


def columns(features: Mapping[str, Feature], source: str, target: str, leave_out: Collection[str] = ()) -> Columns:
    """How features come from one naming to another.

    LeRobot from RLDS: pictures become `observation.images.NAME`, the instruction `task`, the reward `next.reward`,
    `is_terminal` `next.done`; elsewhere dots stand for slashes, and single numbers are [1]. `is_first`, `is_last`
    and LeRobot's index columns follow from an episode's length, and are made anew. The inverse gives RLDS from
    LeRobot; its records keep numbers with fractions as float32 alone, so that float64 becomes that.

    Args:
        features: the source's.
        source, target: "rlds" or "lerobot".
        leave_out: features of the source that the target is not to have.

    Raises:
        DatasetError: `leave_out` names an unknown feature, or two features would have one name.
    """
    unknown = sorted(set(leave_out) - set(features))
    if unknown:
        raise DatasetError(f"leave_out names {unknown}, and there are only {sorted(features)}")
    derived = {*leave_out, *(_FLAGS if source == "rlds" else INDEX_FEATURES)}
    taken = {path: feature for path, feature in features.items() if path not in derived}
    instruction = next((path for path in INSTRUCTIONS if path in taken), "")
    mapped = tuple(_column(path, feature, source, target, instruction) for path, feature in taken.items())
    sources: dict[str, str] = {}
    for column in mapped:
        if column.target in sources:
            raise DatasetError(
                f"{sources[column.target]!r} and {column.source!r} would both be {column.target!r}; leave one out"
            )
        sources[column.target] = column.source
    return Columns(mapped, flags=target == "rlds")


def _column(path: str, feature: Feature, source: str, target: str, instruction: str) -> Column:
    if target == "rlds" and feature.dtype == "float64":
        feature = replace(feature, dtype="float32")
    if source == target:
        return Column(path, path, feature)
    if target == "lerobot":
        return Column(path, _lerobot_name(path, feature, instruction), _shaped(feature, feature.shape or (1,)))
    name = _rlds_path(path)
    return Column(path, name, _shaped(feature, () if name in _SCALARS else feature.shape))


def _lerobot_name(path: str, feature: Feature, instruction: str) -> str:
    if path == instruction:
        return TASK
    if path in _NEXT:
        return _NEXT[path]
    if feature.kind == "image":
        return _CAMERA + path.removeprefix(_OBSERVATION).replace("/", ".")
    return path.replace("/", ".")


def _rlds_path(name: str) -> str:
    if name == TASK:
        return INSTRUCTIONS[0]
    if name in _RLDS_NAMES:
        return _RLDS_NAMES[name]
    if name.startswith(_CAMERA):
        return _OBSERVATION + name.removeprefix(_CAMERA).replace(".", "/")
    return name.replace(".", "/")


def _shaped(feature: Feature, shape: tuple[int, ...]) -> Feature:
    return replace(feature, shape=shape) if feature.kind == "number" else feature


def _values(trajectory: Trajectory, column: Column) -> Steps:
    if column.feature.kind == "image":
        return trajectory.pictures(column.source)
    if column.feature.kind == "text":
        return trajectory.texts(column.source) or ("",) * len(trajectory)
    values = trajectory.numbers(column.source)
    if 0 in column.feature.shape:
        raise DatasetError(f"feature {column.source!r} varies in its size; leave it out")
    return values.reshape(len(trajectory), *column.feature.shape).astype(column.feature.dtype, copy=False)
