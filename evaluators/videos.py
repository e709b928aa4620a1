"""The choice of episodes for videos."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluators.success_table import SuccessTable
from ipvla.types import EpisodeResult

#: Every episode, every one that did not succeed, or this number of each kind (success or not) per task.
VideoChoice = Literal["all", "failures"] | int


@dataclass(frozen=True)
class Video:
    """The recording of one episode; `outcome` as in `EpisodeResult`."""

    policy: str
    task: str
    trial: int
    outcome: str
    path: Path


def chosen_videos(table: SuccessTable, choice: VideoChoice, directory: Path) -> list[tuple[EpisodeResult, Video]]:
    """The chosen episodes of a policy in their order, each with its video's place."""
    so_far: Counter[tuple[str, bool]] = Counter()
    chosen = []
    for result in table.results:
        spec, kind = result.spec, (result.spec.task, result.success)
        so_far[kind] += 1
        if choice == "all" or (not result.success if choice == "failures" else so_far[kind] <= choice):
            path = directory / f"{spec.task}-{spec.trial}-{result.outcome}.mp4"
            chosen.append((result, Video(table.policy, spec.task, spec.trial, result.outcome, path)))
    return chosen
