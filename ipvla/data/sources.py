"""The source of a dataset at a directory or address, whatever its format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from ipvla.data.lerobot import LeRobotSource
from ipvla.data.rlds.dlimp_source import DlimpSource
from ipvla.data.rlds.format import dataset_directory
from ipvla.data.rlds.source import RldsSource
from ipvla.data.source import EpisodeSource, file_system

#: How RLDS is read: by this project, or by TensorFlow's pipeline.
RldsBackend: TypeAlias = Literal["native", "dlimp"]
RLDS_BACKENDS: Final[tuple[str, ...]] = get_args(RldsBackend)


def open_source(
    location: str | Path,
    *,
    read_root: Path | None = None,
    skip_bad_episodes: bool = False,
    rlds_backend: RldsBackend = "native",
) -> EpisodeSource:
    """A LeRobotDataset v3 if that is what is there, else RLDS.

    Args:
        location: a LeRobotDataset or an RLDS version directory (`<data_root>/recall/1.0.0`).
        read_root: where what is only known once it was read is kept for the next opening; None to keep nothing.
        skip_bad_episodes: leave out episodes of RLDS that cannot be read, and count them.
        rlds_backend: "native", or "dlimp" for TensorFlow's own way to read RLDS.

    Raises:
        DatasetError: it is missing or damaged.
    """
    if _is_lerobot(location):
        return LeRobotSource(location, read_root)
    if rlds_backend == "dlimp":
        return DlimpSource(location)
    return RldsSource(location, index_root=read_root, skip_bad_episodes=skip_bad_episodes)


def dataset_location(data_root: Path, name: str) -> str:
    """Where a dataset is: the newest version of its name below `data_root`; a path or address is where it says."""
    if "/" in name:
        return name
    versions = [path.parent for path in (data_root / name).glob("*/dataset_info.json")]
    if versions:
        return str(max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)]))
    return str(data_root / name) if _is_lerobot(data_root / name) else str(dataset_directory(data_root, name))


def _is_lerobot(location: str | Path) -> bool:
    files, root = file_system(str(location))
    return bool(files.exists(f"{root}/meta/info.json"))
