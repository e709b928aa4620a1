"""`python -m ray_jobs.data.show`: a dataset's card with its statistics and warnings, and a sheet of pictures.

    ipvla data show libero_spatial_no_noops
    ipvla data show bridge_orig --skip_noops true --sample 1000
    ipvla data show /data/my_lerobot_dataset --out sheet.html
    ipvla data show /data/my_robot/1.0.0 --standard.cameras "{front: observation/image}" --standard.gripper none

What needs the whole dataset (lengths, statistics) is read once in this process and stored, or taken from what
`ipvla statistics` or training has stored; of large datasets, run `ipvla statistics` first, which uses all CPUs.
Cameras, histograms and shares of steps are of some episodes, evenly chosen. The sheet is one HTML file with
thumbnails, histograms of actions and the texts; it needs no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from evaluators.dataset_card import DatasetCard, card_tables, dataset_card
from evaluators.dataset_sample import evenly, take_sample
from evaluators.dataset_sheet import Strip, histograms, write_sheet
from ipvla.data.survey import surveyed
from ray_jobs.command_line.cli import run
from ray_jobs.data import DatasetConfig


@dataclass(frozen=True)
class ShowConfig(DatasetConfig):
    """What to look at.

    Attributes:
        out: the HTML sheet; by default `datasets/NAME.html` below `artifact_dir`.
        sample: how many episodes are read for histograms, cameras, and shares of steps.
        strips: how many of these the sheet shows frames of.
    """

    positional: ClassVar[str] = "dataset"

    out: Path | None = None
    sample: int = 200
    strips: int = 6

    def __post_init__(self) -> None:
        for name in ("sample", "strips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def sheet(self, name: str) -> Path:
        """Where the sheet of the dataset of that name goes."""
        return self.out.expanduser() if self.out else self.artifacts / "datasets" / f"{name}.html"


def show(config: ShowConfig) -> tuple[DatasetCard, Path]:
    """The card, and the sheet that was written.

    Raises:
        DatasetError: the dataset is missing or damaged, its standard does not fit it, or no episode can be used.
        StorageError: a storage directory cannot be used.
    """
    config.prepare(writes=() if config.out else ("artifact_dir",))
    source = config.open_source()
    standard = config.standard_of(source)
    survey = surveyed(source, standard, config.read_root)
    sample = take_sample(source, standard, survey, config.sample)
    card = dataset_card(source, standard, survey, sample)
    strips = [
        Strip.of(number, standard.episode(source.trajectory(number)))
        for number in evenly(sample.episodes, config.strips)
    ]
    return card, write_sheet(card, strips, histograms(card, sample), config.sheet(source.name))


def main(config: ShowConfig) -> None:
    """Prints the card and says where the sheet is."""
    console = Console()
    card, sheet = show(config)
    for part in card_tables(card):
        console.print(part)
    print(f"written: {sheet}")


if __name__ == "__main__":
    run(ShowConfig, main, __doc__)
