"""A dataset's card on the console."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from evaluators.dataset_card import DatasetCard
from ipvla.data.normalisation import FeatureStatistics

#: The rows of a feature's statistics, in the order of their columns.
ROWS = ("mean", "std", "min", "q01", "q99", "max")
#: More tasks than this are not listed.
_TASKS = 12


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
