"""The source of a dataset at a directory or address, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from ipvla.data.lerobot import LeRobotSource
from ipvla.data.rlds.dlimp_source import DlimpSource
from ipvla.data.rlds.format import VERSION_NAME, dataset_directory
from ipvla.data.rlds.source import RldsSource
from ipvla.data.source import DatasetError, EpisodeSource, file_system
from ipvla.storage import absolute

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
    """A LeRobotDataset v3 if that is what is there, else RLDS; arguments as of `open_dataset`.

    Raises:
        DatasetError: it is missing or damaged.
    """
    if _is_lerobot(location):
        return LeRobotSource(location, read_root)
    if rlds_backend == "dlimp":
        return DlimpSource(location)
    return RldsSource(location, index_root=read_root, skip_bad_episodes=skip_bad_episodes)


def absolute_location(name: str) -> str:
    """A dataset's path made absolute, `~` expanded; a name below the data root or an address stays."""
    return str(absolute(name)) if "/" in name and "://" not in name else name


def dataset_location(data_root: Path, name: str) -> str:
    """Where a dataset is: the newest version of its name below `data_root`; a path or address is where it says.

    Versions are three numbers (1.0.0): what else lies there are copies and unfinished builds. They may lie below
    the dataset's only configuration (NAME/CONFIG/1.0.0), and a dataset of one version may have none (NAME).

    Raises:
        DatasetError: the name has several configurations.
    """
    if "/" in name:
        return name
    directory = data_root / name
    versions = _versions(directory)
    if not versions:
        configs = sorted({path.parent for path in _versions(directory, "*/*")})
        if len(configs) > 1:
            named = ", ".join(f"{config}/{max(_versions(config), key=_numbers).name}" for config in configs)
            raise DatasetError(f"{name} has several configurations; give the directory of one: {named}")
        versions = _versions(configs[0]) if configs else []
    if versions:
        return str(max(versions, key=_numbers))
    if (directory / "dataset_info.json").exists() or _is_lerobot(directory):
        return str(directory)
    return str(dataset_directory(data_root, name))


def _versions(directory: Path, pattern: str = "*") -> list[Path]:
    directories = [path.parent for path in directory.glob(f"{pattern}/dataset_info.json")]
    return [path for path in directories if VERSION_NAME.fullmatch(path.name)]


def _numbers(version: Path) -> list[int]:
    return [int(part) for part in version.name.split(".")]


def _is_lerobot(location: str | Path) -> bool:
    files, root = file_system(str(location))
    return bool(files.exists(f"{root}/meta/info.json"))
