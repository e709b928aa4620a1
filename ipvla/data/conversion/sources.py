"""Which format a dataset has, by its files."""

from __future__ import annotations

from pathlib import Path

from ipvla.data import sources
from ipvla.data.lerobot.format import INFO, Tree
from ipvla.data.libero_hdf5 import LiberoHdf5Source
from ipvla.data.source import DatasetError, EpisodeSource

RLDS, LEROBOT, HDF5 = "rlds", "lerobot", "libero_hdf5"


def format_of(location: str) -> str:
    """ "rlds", "lerobot" or "libero_hdf5". DatasetError if nothing is there, or nothing that is known."""
    tree = Tree(location)
    if not tree.files.exists(tree.path("")) and not location.endswith(".hdf5"):
        raise DatasetError(f"source {location} does not exist; give the directory or address of a dataset")
    if tree.exists(INFO):
        return LEROBOT
    if tree.exists("dataset_info.json") or tree.glob("*/dataset_info.json"):
        return RLDS
    if tree.local and (location.endswith(".hdf5") or tree.glob("*.hdf5")):
        return HDF5
    raise DatasetError(
        f"{location} is neither an RLDS version directory (dataset_info.json), nor a LeRobotDataset ({INFO}), nor "
        "a local directory of LIBERO's *.hdf5 files"
    )


def naming_of(format_name: str) -> str:
    """Whose names a format's features have."""
    return LEROBOT if format_name == LEROBOT else RLDS


def open_source(location: str, cache_directory: Path, skip_bad_episodes: bool = False) -> EpisodeSource:
    """The episodes of a dataset in any format.

    Args:
        location: directory or address.
        cache_directory: for lists of episodes and for copies of remote videos.
        skip_bad_episodes: leave out RLDS episodes that cannot be read.

    Raises:
        DatasetError: it is none, or damaged.
    """
    if format_of(location) == HDF5:
        return LiberoHdf5Source(location)
    return sources.open_source(location, read_root=cache_directory, skip_bad_episodes=skip_bad_episodes)
