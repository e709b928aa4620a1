"""Which dataset, and how its episodes are to be understood: the settings of every job that reads one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self, TypeAlias

from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.source import EpisodeSource
from ipvla.data.sources import absolute_location, dataset_location, open_source
from ipvla.data.standards import Standard, StandardConfig, standard_of
from ipvla.storage import StorageRoots

OpenSource: TypeAlias = Callable[[], EpisodeSource]


@dataclass(frozen=True)
class DatasetConfig(StorageRoots):
    """Of which dataset, and how its episodes are to be understood.

    Attributes:
        dataset: a name below `data_root_dir`, or the path or address of a dataset's version directory.
        standard: which features are what, for a dataset that is not known by name.
        skip_noops: leave out steps that do nothing.
        padded_state: a 0 before the gripper in the state of LIBERO and Bridge, as OpenVLA has it.
        skip_bad_episodes: leave out episodes that cannot be read, and say how many.
    """

    dataset: str = "recall"
    standard: StandardConfig | None = None
    skip_noops: bool = False
    padded_state: bool = False
    skip_bad_episodes: bool = False

    def absolute(self) -> Self:
        """With absolute paths, the dataset's too."""
        return replace(super().absolute(), dataset=absolute_location(self.dataset))

    @property
    def location(self) -> str:
        """Of the version directory."""
        return dataset_location(self.datasets, self.dataset)

    @property
    def read_root(self) -> Path:
        """Where training, too, keeps what is only known once a dataset was read."""
        return self.cache / "datasets"

    def open_dataset(self) -> EpisodeDataset:
        """Its episodes. DatasetError if it is missing or damaged."""
        return open_dataset(
            self.location,
            standard=self.standard,
            skip_noops=self.skip_noops,
            padded_state=self.padded_state,
            read_root=self.read_root,
            skip_bad_episodes=self.skip_bad_episodes,
        )

    @property
    def open_source(self) -> OpenSource:
        """Opens the dataset, in any process."""
        return partial(
            open_source,
            self.location,
            read_root=self.read_root,
            skip_bad_episodes=self.skip_bad_episodes,
        )

    def standard_of(self, source: EpisodeSource) -> Standard:
        """DatasetError if it is unknown, or a setting does not apply."""
        return standard_of(source, self.standard, skip_noops=self.skip_noops, padded_state=self.padded_state)
