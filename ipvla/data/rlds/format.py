"""Names of files, cameras and features of RLDS datasets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

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
