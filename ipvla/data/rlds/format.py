"""Names of files, cameras and features of RLDS datasets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tensorflow_datasets as tfds

from ipvla.data.source import DatasetError, Feature, Trajectory

VERSION = "1.0.0"
#: What tfds calls the directory of a version.
VERSION_NAME: Final = re.compile(r"\d+\.\d+\.\d+")
SPLIT = "train"
STATISTICS_FILE = "dataset_statistics.json"
#: Lengths and labels of all episodes, so that opening a dataset need not read it. Optional for a reader.
EPISODES_FILE = "episodes.json"

#: Features that hold the task in words, most usual first.
INSTRUCTIONS = ("language_instruction", "observation/natural_language_instruction")
#: LIBERO's RLDS names its two cameras `image` and `wrist_image`; other cameras keep their own name.
LIBERO_CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
_LIBERO_KEYS = {camera: key for key, camera in LIBERO_CAMERAS.items()}


def dataset_directory(data_root: Path, name: str) -> Path:
    """Where `write_rlds(data_root, name, ...)` puts a dataset: `<data_root>/<name>/1.0.0`."""
    return data_root / name / VERSION


def dataset_name(location: str, builder: Any) -> str:
    """What a dataset at NAME/VERSION or NAME/CONFIG/VERSION is called; elsewhere as tfds's builder calls it."""
    *parents, last = location.rstrip("/").split("/")
    if len(parents) > 1 and parents[-1] == builder.info.config_name:
        parents.pop()
    return parents[-1] if VERSION_NAME.fullmatch(last) and parents and parents[-1] else str(builder.name)


def image_key(camera: str) -> str:
    """The observation feature that holds a camera's frames."""
    return _LIBERO_KEYS.get(camera, camera)


FILE_FORMATS = ("tfrecord", "array_record")


@dataclass(frozen=True)
class RldsLayout:
    """The features of every step and episode, and how they are stored.

    Attributes:
        name: of the dataset: lower-case letters, digits and underscores, starting with a letter.
        features: of a step, by path ("observation/image", "action").
        encodings: of its pictures, by path, "png" or "jpeg".
        metadata: features of an episode, by path without "episode_metadata/".
        file_format: "tfrecord", which every tool reads, or "array_record".
        description: of the dataset, in words.

    Raises:
        DatasetError: a name or a feature cannot be.
    """

    name: str
    features: Mapping[str, Feature]
    encodings: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Feature] = field(default_factory=dict)
    file_format: str = "tfrecord"
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name != self.name.lower():
            raise DatasetError(
                f"{self.name!r} is no name of an RLDS dataset; use lower-case letters, digits and underscores, "
                "and begin with a letter"
            )
        if self.file_format not in FILE_FORMATS:
            raise DatasetError(f"file_format is {self.file_format!r}; known are {', '.join(FILE_FORMATS)}")
        nested(self.features)

    def builder_info(self, directory: str) -> Any:
        """tfds's description of the dataset, without its shards."""
        f = tfds.features
        steps = f.Dataset(
            _tree(nested({path: self._tfds(path, feature) for path, feature in self.features.items()}))
        )
        metadata = nested({path: self._tfds(path, feature) for path, feature in self.metadata.items()})
        identity = tfds.core.DatasetIdentity(
            name=self.name, version=tfds.core.Version(VERSION), data_dir=directory, module_name="ipvla.data.rlds"
        )
        return tfds.core.DatasetInfo(
            builder=identity,
            features=f.FeaturesDict({"steps": steps, "episode_metadata": f.FeaturesDict(_tree(metadata))}),
            description=self.description,
        )

    def _tfds(self, path: str, feature: Feature) -> Any:
        shape = tuple(size or None for size in feature.shape)
        if feature.kind == "image":
            return tfds.features.Image(
                shape=shape, encoding_format=self.encodings[path], dtype=np.dtype(feature.dtype)
            )
        if feature.kind == "text":
            return tfds.features.Text()
        if not shape:
            return tfds.features.Scalar(np.dtype(feature.dtype))
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(feature.dtype))


def of_success(length: int) -> dict[str, npt.NDArray[Any]]:
    """RLDS's reward, discount and flags of an episode that ends in success: the reward is 1 at its end."""
    first, last = (np.arange(length) == place for place in (0, length - 1))
    flags = {"is_first": first, "is_last": last, "is_terminal": last}
    return {"reward": last.astype(np.float32), "discount": np.ones(length, np.float32), **flags}


def task_and_family(trajectory: Trajectory) -> tuple[str, str]:
    """What an episode's metadata say of it; without a task there, the task in words."""
    spoken = (texts[0] for path in INSTRUCTIONS if (texts := trajectory.texts(path)))
    return str(trajectory.metadata.get("task", next(spoken, ""))), str(trajectory.metadata.get("family", ""))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dictionaries within one another -> values by path, the inverse of `nested`."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return values


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path -> dictionaries within one another. DatasetError if a path begins another."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise DatasetError(
                    f"feature {path!r} lies within another feature, {parent!r}; leave one of them out"
                )
        if name in branch:
            raise DatasetError(f"feature {path!r} holds other features too; leave it or them out")
        branch[name] = value
    return tree


def _tree(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tfds.features.FeaturesDict(_tree(value)) if isinstance(value, dict) else value
        for name, value in values.items()
    }
