"""Datasets side by side: one list of episodes, each with its own dataset's standard and statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ipvla.contract import Contract, common
from ipvla.data.dataset import EpisodeDataset
from ipvla.data.geometry import PointTerms
from ipvla.data.mixtures import Mixture
from ipvla.data.reasoning import Coverage
from ipvla.data.source import DatasetError
from ipvla.data.standards.standard import EncodedEpisode
from ipvla.data.statistics import Statistics
from ipvla.types import Observation

IntArray = npt.NDArray[np.int64]


class MixtureDataset:
    """The episodes of several datasets, one dataset after another, seen as often as a mixture says.

    Args:
        parts: the datasets by the names that the mixture has them by.
        mixture: their weights; None for 1 each.
        proprio: the columns of proprioception that are used, None for all; () for none, which datasets of other
            robots may need.

    Attributes:
        parts: by name, in order.
        cameras, step_features: those that all parts have.
        standard: of the first part; the others agree in how actions are encoded.
        lengths, tasks, families, and what is not documented here: as in `EpisodeDataset`, of all parts.

    Raises:
        DatasetError: parts have actions of different sizes or conventions, or proprioception that does not fit.
    """

    def __init__(
        self,
        parts: Mapping[str, EpisodeDataset],
        mixture: Mixture | None = None,
        proprio: tuple[int, ...] | None = None,
    ) -> None:
        self.parts = dict(parts)
        self._mixture = mixture or Mixture(dict.fromkeys(self.parts, 1.0))
        sizes = {
            name: (part.episode(0).action.shape[1], part.episode(0).state.shape[1])
            for name, part in self.parts.items()
        }
        actions, states = ({size[i] for size in sizes.values()} for i in (0, 1))
        needed = max(proprio, default=-1) + 1 if proprio is not None else max(states)
        if len(actions) > 1 or min(states) < needed or (proprio is None and len(states) > 1):
            each = ", ".join(f"{name} {action} and {state}" for name, (action, state) in sizes.items())
            raise DatasetError(
                f"datasets with actions and proprioception of different sizes cannot be mixed: {each}; configure "
                "standards that make them equal, choose columns that all have (data.proprio, [] for none), or mix "
                "others"
            )
        conventions = {
            name: (part.standard.gripper, part.standard.normalised, part.standard.absolute)
            for name, part in self.parts.items()
        }
        if len(set(conventions.values())) > 1:
            raise DatasetError(
                f"datasets that encode actions differently cannot be mixed: {conventions}; configure standards "
                "that agree"
            )
        self._names, self._datasets = tuple(self.parts), tuple(self.parts.values())
        self.name, self.location = "+".join(self.parts), ", ".join(part.location for part in self._datasets)
        self.cameras = tuple(sorted(set.intersection(*(set(part.cameras) for part in self._datasets))))
        self.step_features = frozenset.intersection(*(part.step_features for part in self._datasets))
        self.standard = self._datasets[0].standard
        self.broken = sum(part.broken for part in self._datasets)
        self.skips_bad_episodes = any(part.skips_bad_episodes for part in self._datasets)
        self._first = np.cumsum([0, *(len(part) for part in self._datasets)])
        self.lengths: IntArray = np.concatenate([part.lengths for part in self._datasets])
        self.tasks = tuple(task for part in self._datasets for task in part.tasks)
        self.families = tuple(family for part in self._datasets for family in part.families)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def contract(self) -> Contract:
        """What the contracts of all parts agree in."""
        return common([part.contract for part in self._datasets])

    @property
    def pictures_every(self) -> int:
        """Control steps after which all parts have a new picture."""
        return math.lcm(*(part.pictures_every for part in self._datasets))

    def part(self, index: int) -> str:
        return self._names[self._place(index)[0]]

    def repeats(self, seed: int, epoch: int) -> IntArray:
        """int64 [E], how often each episode is seen in an epoch: `Mixture.repeats`."""
        lengths = {name: part.lengths for name, part in self.parts.items()}
        drawn = self._mixture.repeats(lengths, seed, epoch)
        return np.concatenate([drawn[name] for name in self.parts])

    def episode(self, index: int) -> EncodedEpisode:
        part, own = self._place(index)
        return self._datasets[part].episode(own)

    def observation(
        self, index: int, t: int, cameras: Sequence[str], points: PointTerms | None = None
    ) -> Observation:
        part, own = self._place(index)
        return self._datasets[part].observation(own, t, cameras, points)

    def without_geometry(self, cameras: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        every = [part.without_geometry(cameras) for part in self._datasets]
        no_depth, no_pose = (tuple(dict.fromkeys(name for one in every for name in one[i])) for i in (0, 1))
        return no_depth, no_pose

    def statistics(self) -> Statistics:
        """Of the first part, which normalise rollouts by default."""
        return self._datasets[0].statistics()

    def mixed(self) -> dict[str, Statistics]:
        """Of every part, by its name."""
        return {name: part.statistics() for name, part in self.parts.items()}

    def instructions(self) -> frozenset[str]:
        return frozenset().union(*(part.instructions() for part in self._datasets))

    def coverage(self) -> list[tuple[str, Coverage]]:
        return [covered for part in self._datasets for covered in part.coverage()]

    def require_readable(self) -> None:
        for part in self._datasets:
            part.require_readable()

    @property
    def reworded(self) -> int:
        return sum(part.reworded for part in self._datasets)

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} is outside the {len(self)} episodes of {self.name}")
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return part, index - int(self._first[part])


#: The standardised episodes of one source, or of several side by side.
Dataset: TypeAlias = EpisodeDataset | MixtureDataset
