"""A dataset's card: its content, its size, and what is suspicious; and how the console shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from evaluators.dataset_sample import Camera, DatasetSample
from evaluators.dataset_warnings import DatasetWarning, dataset_warnings
from ipvla.data.normalisation import FeatureStatistics
from ipvla.data.source import EpisodeSource
from ipvla.data.standards import Standard
from ipvla.data.statistics import Statistics
from ipvla.data.survey import Survey

#: The rows of a feature's statistics, in the order of their columns.
ROWS = ("mean", "std", "min", "q01", "q99", "max")
#: More tasks than this are not listed.
_TASKS = 12


@dataclass(frozen=True)
class Lengths:
    """Of the episodes that can be used, in control steps that are kept."""

    least: int
    median: float
    mean: float
    most: int

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64]) -> Self:
        return cls(int(lengths.min()), float(np.median(lengths)), float(lengths.mean()), int(lengths.max()))


@dataclass(frozen=True)
class DatasetCard:
    """One dataset as its standard gives it.

    Attributes:
        name, location: the source's.
        format: "LeRobotDataset v3" or "RLDS", with the format of its records.
        standard: name of the standard's class, and what is not usual about it.
        fps: control steps per second; None where the dataset does not say.
        episodes: that can be used; `transitions` are their control steps.
        broken: what is wrong with each of those that cannot be.
        unlabelled: episodes that can be used and have no task in words.
        reworded: episodes that can be used and within which the task in words changes.
        tasks: episodes of each, most first; `families` likewise, without "".
        statistics: over all episodes that can be used.
        sampled: of how many episodes `cameras`, `noops` and `reasoning` are (`DatasetSample`).
    """

    name: str
    location: str
    format: str
    standard: str
    fps: float | None
    episodes: int
    transitions: int
    broken: tuple[str, ...]
    unlabelled: int
    reworded: int
    lengths: Lengths
    tasks: Mapping[str, int]
    families: Mapping[str, int]
    statistics: Statistics
    sampled: int
    cameras: tuple[Camera, ...]
    noops: float | None
    reasoning: float
    warnings: tuple[DatasetWarning, ...]


def dataset_card(source: EpisodeSource, standard: Standard, survey: Survey, sample: DatasetSample) -> DatasetCard:
    """The card; `survey` and `sample` are of this source with this standard."""
    used = survey.lengths > 0
    broken = (*source.broken, *survey.broken.values())
    numbers = np.flatnonzero(used).tolist()
    families = Counter(family for number in numbers if (family := source.families[number]))
    return DatasetCard(
        name=source.name,
        location=source.location,
        format=source.format,
        standard=_described(standard),
        fps=source.fps,
        episodes=len(numbers),
        transitions=survey.statistics.num_transitions,
        broken=broken,
        unlabelled=int((~survey.labelled & used).sum()),
        reworded=int((survey.reworded & used).sum()),
        lengths=Lengths.of(survey.lengths[used]),
        tasks=dict(Counter(source.tasks[number] for number in numbers).most_common()),
        families=dict(families.most_common()),
        statistics=survey.statistics,
        sampled=len(sample.episodes),
        cameras=sample.cameras,
        noops=sample.noops,
        reasoning=sample.reasoning,
        warnings=dataset_warnings(standard, survey, sample, len(broken)),
    )


def _described(standard: Standard) -> str:
    notes = [f"gripper {standard.gripper}"]
    if any(standard.trimmed):
        notes.append("without the first {} and last {} steps".format(*standard.trimmed))
    if getattr(standard, "padded_state", False):
        notes.append("state padded as OpenVLA's")
    if standard.skip_noops:
        notes.append("without steps that do nothing")
    return f"{type(standard).__name__}: {', '.join(notes)}"


def card_lines(card: DatasetCard) -> Iterator[tuple[str, str]]:
    """Name and value of all that is no table."""
    lengths = card.lengths
    yield "location", card.location
    yield "format", card.format
    yield "standard", card.standard
    for camera in card.cameras:
        sizes = ", ".join(f"{width} x {height}" for height, width in camera.sizes) or "nothing that can be decoded"
        yield f"camera {camera.name}", f"{sizes}, {camera.encoding} ({camera.feature})"
    yield "control rate", "unknown" if card.fps is None else f"{card.fps:g} per second"
    yield "episodes", f"{card.episodes:,}" + (f", and {len(card.broken):,} broken" if card.broken else "")
    yield "transitions", f"{card.transitions:,}"
    yield (
        "steps per episode",
        f"{lengths.least} to {lengths.most}, median {lengths.median:g}, mean {lengths.mean:.1f}",
    )
    if card.families:
        yield "families", ", ".join(f"{family} {count}" for family, count in card.families.items())
    yield "without a task in words", f"{card.unlabelled:,} episodes"
    if card.reworded:
        yield "task in words changes", f"within {card.reworded:,} episodes"
    yield "steps that do nothing", "not known of such actions" if card.noops is None else _share(card, card.noops)
    yield "steps with reasoning", _share(card, card.reasoning)


def card_tables(card: DatasetCard) -> Iterator[RenderableType]:
    """What `ipvla data show` prints; warnings come last."""
    head = Table(title=Text(card.name), show_header=False)
    head.add_column()
    head.add_column(overflow="fold")
    for name, value in card_lines(card):
        head.add_row(Text(name), Text(value))
    yield head
    tasks = Table("task", "episodes", title=f"{len(card.tasks):,} tasks")
    for task, count in list(card.tasks.items())[:_TASKS]:
        tasks.add_row(Text(task or "(none)"), f"{count:,}")
    if len(card.tasks) > _TASKS:
        tasks.add_row(f"{len(card.tasks) - _TASKS:,} more", f"{sum(list(card.tasks.values())[_TASKS:]):,}")
    yield tasks
    for name, statistics in (("action", card.statistics.action), ("proprioception", card.statistics.proprio)):
        yield _feature_table(name, statistics)
    if not card.warnings:
        yield Text("no warnings", style="green")
    for warning in card.warnings:
        yield Text.assemble(("warning: ", "yellow"), f"{warning.what}\n    what to do: {warning.remedy}")
    for message in card.broken[:3]:
        yield Text(f"broken: {message}", style="yellow")


def statistics_rows(statistics: FeatureStatistics) -> list[tuple[str, ...]]:
    """One per dimension: its number, `ROWS`, and whether it is normalised."""
    columns = [getattr(statistics, row) for row in ROWS]
    return [
        (str(d), *(f"{column[d]:.4g}" for column in columns), "yes" if statistics.mask[d] else "no")
        for d in range(statistics.dim)
    ]


def _feature_table(name: str, statistics: FeatureStatistics) -> Table:
    table = Table(title=name)
    for heading in ("", *ROWS, "normalised"):
        table.add_column(heading, justify="right")
    for row in statistics_rows(statistics):
        table.add_row(*row)
    return table


def _share(card: DatasetCard, share: float) -> str:
    among = "" if card.sampled == card.episodes else f", of {card.sampled} episodes that were looked at"
    return f"{share:.1%}{among}"
