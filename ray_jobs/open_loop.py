"""`python -m ray_jobs.open_loop`: a policy's actions beside recorded ones, before a robot moves.

    ipvla open_loop /data/arms --study arms --name gru
    ipvla open_loop libero_spatial_no_noops --policy ~/ipvla_storage/runs/real/openvla/policy --episodes 3

The policy sees some episodes as they were recorded, in order and with its memory. Prints the mean error of every
number of an action in the data's units, and writes `open_loop.json` and `open_loop.png` (one episode) beside the
policy. Repeating the last action should be worse; where it is not, do not let a robot move.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table

from evaluators.dataset_sample import evenly
from evaluators.open_loop import OpenLoop, open_loop
from evaluators.plots import open_loop_tracks
from ipvla.files import write_text
from ray_jobs.command_line.cli import run
from ray_jobs.data import DatasetConfig
from ray_jobs.running.chosen_policy import ChosenPolicy
from ray_jobs.running.display import EpisodeProgress


@dataclass(frozen=True)
class OpenLoopConfig(ChosenPolicy, DatasetConfig):
    """On which episodes.

    Attributes:
        episodes: how many of the dataset's, evenly chosen.
    """

    positional: ClassVar[str] = "dataset"

    episodes: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodes < 1:
            raise ValueError(f"episodes is {self.episodes}; it must be at least 1")


def measure(config: OpenLoopConfig, console: Console) -> tuple[OpenLoop, Path]:
    """The figures, and the picture that was written.

    Raises:
        CheckpointError: the policy does not exist or is damaged.
        ClusterError: there is no GPU to use.
        ContractError: it reads or gives something else than the dataset holds.
        DatasetError: the dataset is missing or damaged.
    """
    config.prepare(writes=())
    torch.set_num_threads(config.threads)
    policy = config.load()
    dataset = config.open_dataset()
    chosen = evenly(range(len(dataset)), config.episodes)
    with EpisodeProgress(console) as progress, torch.inference_mode():
        bar = progress.add_task(dataset.name, total=len(chosen))
        found, tracks = open_loop(policy, dataset, chosen, lambda: progress.advance(bar))
    record = {"dataset": dataset.location, "episodes": list(chosen), "execute": policy.execute, **found.to_dict()}
    write_text(config.directory.parent / "open_loop.json", json.dumps(record, indent=1))
    picture = config.directory.parent / "open_loop.png"
    picture.write_bytes(open_loop_tracks(tracks[0]))
    return found, picture


def table(found: OpenLoop) -> Table:
    """A row for each number of an action."""
    shown = Table(title="Mean absolute error, in the data's units")
    for column in ("number", "played", "rest of chunk", "last action held", "mean action", "correlation"):
        shown.add_column(column, justify="right")
    for i, row in enumerate(
        zip(found.played, found.ahead, found.held, found.spread, found.correlation, strict=True)
    ):
        shown.add_row(str(i), *("-" if math.isnan(value) else f"{value:.3g}" for value in row))
    return shown


def main(config: OpenLoopConfig) -> None:
    """Prints the errors, which numbers are useless, and where the picture is."""
    console = Console()
    found, picture = measure(config, console)
    console.print(table(found))
    if found.no_better:
        numbers = ", ".join(map(str, found.no_better))
        print(f"no better than holding still or the mean: numbers {numbers}; do not let a robot move")
    print(f"one episode: {picture}")


if __name__ == "__main__":
    run(OpenLoopConfig, main, __doc__)
