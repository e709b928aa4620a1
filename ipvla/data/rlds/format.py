"""The on-disk layout: LIBERO's RLDS step features, `reasoning` and questions; file names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow_datasets as tfds

VERSION = "1.0.0"
#: What tfds calls the directory of a version.
VERSION_NAME: Final = re.compile(r"\d+\.\d+\.\d+")
SPLIT = "train"
STATISTICS_FILE = "dataset_statistics.json"
#: Lengths and labels of all episodes, so that opening a dataset need not read it. Optional for a reader.
EPISODES_FILE = "episodes.json"

#: LIBERO's RLDS names its two cameras `image` and `wrist_image`; other cameras keep their own name.
_LIBERO_KEYS = {"agentview": "image", "robot0_eye_in_hand": "wrist_image"}
_LIBERO_CAMERAS = {key: camera for camera, key in _LIBERO_KEYS.items()}


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


def camera_of(key: str) -> str:
    """The inverse of `image_key`."""
    return _LIBERO_CAMERAS.get(key, key)


def rlds_features(
    image_shapes: Mapping[str, tuple[int, int, int]], proprio_dim: int, action_dim: int, questions: bool = False
) -> Any:
    """The tfds features of one record, which is one whole episode; `image_shapes` is by camera name.

    `questions`: steps have `question` and `answer` too.
    """
    f = tfds.features
    images = {image_key(camera): f.Image(shape=s, encoding_format="png") for camera, s in image_shapes.items()}
    return f.FeaturesDict(
        {
            "steps": f.Dataset(
                {
                    "observation": f.FeaturesDict(
                        {**images, "state": f.Tensor(shape=(proprio_dim,), dtype=np.float32)}
                    ),
                    "action": f.Tensor(shape=(action_dim,), dtype=np.float32),
                    "language_instruction": f.Text(),
                    "reasoning": f.Text(),
                    **({"question": f.Text(), "answer": f.Text()} if questions else {}),
                    "reward": f.Scalar(np.float32),
                    "discount": f.Scalar(np.float32),
                    "is_first": f.Scalar(np.bool_),
                    "is_last": f.Scalar(np.bool_),
                    "is_terminal": f.Scalar(np.bool_),
                }
            ),
            "episode_metadata": f.FeaturesDict(
                {"task": f.Text(), "family": f.Text(), "seed": f.Scalar(np.int64), "file_path": f.Text()}
            ),
        }
    )
