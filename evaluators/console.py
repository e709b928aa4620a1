"""Success and paired comparisons as tables: on the console, and as Markdown for the description of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal

from rich.table import Table

from evaluators.paired import PairedComparison
from evaluators.success_table import SuccessRow, SuccessTable


def success_table(tables: Sequence[SuccessTable], title: str = "Success on held-out layouts") -> Table:
    """Family x policy: k/n, rate, Wilson 95 % interval; chance in the last column."""
    table = Table(title=title)
    table.add_column("family")
    for policy in tables:
        table.add_column(policy.policy, justify="right")
    table.add_column("chance", justify="right")
    for family, cells, chance in success_rows(tables):
        table.add_row(family, *cells, f"{chance:.2f}")
    stopped = [
        f"{policy.policy} {policy.anytime95[0]:.2f}-{policy.anytime95[1]:.2f}"
        for policy in tables
        if policy.anytime95 is not None
    ]
    captions = []
    if stopped:
        captions.append(f"mean over tasks, in an interval that allows for stopping early: {', '.join(stopped)}")
    reached = [f"{one.policy} {fmean(one.subgoals.values()):.2f}" for one in tables if one.subgoals]
    if reached:
        captions.append(f"sub-goals reached, mean over tasks: {', '.join(reached)}")
    table.caption = "; ".join(captions) or None
    return table


def success_rows(
    tables: Sequence[SuccessTable], kind: Literal["families", "tasks"] = "families"
) -> list[tuple[str, list[str], float]]:
    """Of every family or task its name, a cell per policy, and chance."""
    columns = [{row.name: row for row in getattr(table, kind)} for table in tables]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        found = [column.get(name) for column in columns]
        rows.append((name, [*map(success_cell, found)], next(row.chance for row in found if row)))
    return rows


def success_cell(row: SuccessRow | None) -> str:
    """E.g. `47/50  0.94 (0.84-0.98)`; a dash for no episodes."""
    if row is None:
        return "-"
    low, high = row.wilson95
    return f"{row.k}/{row.n}  {row.rate:.2f} ({low:.2f}-{high:.2f})"


def comparison_table(comparisons: Sequence[PairedComparison]) -> Table:
    """Difference and exact McNemar test per family, on the layouts that both policies played."""
    table = Table(title="Paired on the same layouts (bootstrap interval, exact McNemar)")
    for heading in ("family", "pairs", "only the first", "only the second", "difference (95 %)", "p"):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for c in comparisons:
        name = f"{c.family}: {c.first} against {c.second}"
        table.add_row(
            name, str(c.pairs), str(c.only_first), str(c.only_second), difference_cell(c), f"{c.p_value:.2g}"
        )
    return table


def difference_cell(comparison: PairedComparison) -> str:
    """E.g. `+0.14 (+0.02, +0.26)`; of one layout per task there is no interval."""
    interval = comparison.difference95
    if interval is None:
        layouts = "one layout" if comparison.pairs == 1 else "one layout per task"
        return f"{comparison.difference:+.2f} (no interval: {layouts})"
    low, high = interval
    return f"{comparison.difference:+.2f} ({low:+.2f}, {high:+.2f})"


def result_note(tables: Sequence[SuccessTable], comparisons: Sequence[PairedComparison] = ()) -> str:
    """Markdown: family x policy with Wilson's 95 % intervals, then the differences on the same layouts."""
    rows = [(family, *cells, f"{chance:.2f}") for family, cells, chance in success_rows(tables)]
    note = markdown_table(("family", *(table.policy for table in tables), "chance"), rows)
    if comparisons:
        rows = [
            (one.family, f"{one.first} - {one.second}", str(one.pairs), difference_cell(one), f"{one.p_value:.2g}")
            for one in comparisons
        ]
        headings = ("family", "minus", "pairs", "difference (95 %)", "McNemar's p")
        note += f"\n\n{markdown_table(headings, rows)}"
    return note


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """A table in Markdown; `rule` is that of all columns but the first."""
    cells = [" | ".join(cell.replace("|", "/") for cell in row) for row in (headings, *rows)]
    head, *below = (f"| {row} |" for row in cells)
    return "\n".join([head, "|---" + f"|{rule}" * (len(headings) - 1) + "|", *below])
