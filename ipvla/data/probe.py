"""The probe: a few frames with their instructions, on which a policy's geometry is read and never trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.geometry import PointTerms
from ipvla.data.rlds import dataset_directory
from ipvla.data.source import DatasetError
from ipvla.data.transforms import Transforms
from ipvla.types import ModelInputs, Observation


@dataclass(frozen=True)
class ProbeConfig:
    """Which frames.

    Attributes:
        dataset: name of an RLDS dataset below the probe root, of episodes that are neither trained nor judged on.
        records: N, frames drawn from it.
        seed: of the draw.
    """

    dataset: str = "recall_probe"
    records: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.records < 2:
            raise ValueError(f"probe.records is {self.records}; it must be at least 2")
        if self.seed < 0:
            raise ValueError(f"probe.seed is {self.seed}; it must be 0 or more")

    def build(self, probe_root: Path) -> ProbeSet:
        """Opens it. DatasetError if the dataset is missing, damaged, or has too few frames."""
        return ProbeSet(open_dataset(dataset_directory(probe_root, self.dataset)), self)


class ProbeSet:
    """N frames, spread evenly over the episodes, each a pure function of dataset and config.

    Attributes:
        frames: (episode, control step) of each record, in order.
    """

    def __init__(self, dataset: EpisodeDataset, config: ProbeConfig) -> None:
        self._dataset = dataset
        rng, every = np.random.default_rng(config.seed), dataset.pictures_every
        order = rng.permutation(len(dataset))
        share, more = divmod(config.records, len(dataset))
        frames: list[tuple[int, int]] = []
        for place, episode in enumerate(order.tolist()):
            count, length = share + (place < more), -(-int(dataset.lengths[episode]) // every)
            if count > length:
                raise DatasetError(
                    f"probe.records is {config.records}, which asks for {count} frames of an episode of {length} "
                    f"in {dataset.location}; lower it, or collect more episodes"
                )
            drawn = sorted(rng.choice(length, count, replace=False).tolist())
            frames += [(episode, picture * every) for picture in drawn]
        self.frames = tuple(frames)

    def __len__(self) -> int:
        return len(self.frames)

    def observations(
        self, records: Sequence[int], cameras: Sequence[str], points: PointTerms | None = None
    ) -> list[Observation]:
        """What was seen there; `points` as of `EpisodeDataset.observation`."""
        return [self._dataset.observation(*self.frames[record], cameras, points) for record in records]

    def batches(self, transforms: Transforms, size: int = 64) -> list[ModelInputs]:
        """All records in order, `size` at a time."""
        return [self.batch(transforms, range(i, min(i + size, len(self)))) for i in range(0, len(self), size)]

    def batch(self, transforms: Transforms, records: Sequence[int]) -> ModelInputs:
        """These records as a policy's inputs [B]."""
        return transforms.inputs(self.observations(records, transforms.cameras, transforms.points))

    @cached_property
    def sha256(self) -> str:
        """Hash of the records' pictures, proprioception and instructions."""
        digest = hashlib.sha256()
        for record in range(len(self)):
            (seen,) = self.observations([record], self._dataset.cameras)
            for camera in sorted(seen.images):
                digest.update(seen.images[camera].tobytes())
            digest.update(np.asarray(seen.proprio, np.float32).tobytes())
            digest.update(f"{seen.instruction}\0".encode())
        return digest.hexdigest()
