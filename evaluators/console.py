"""Success and paired comparisons as tables: on the console, and as Markdown for the description of a run."""

from __future__ import annotations

from collections.abc import Sequence

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
    cells = [{row.name: row for row in policy.families} for policy in tables]
    for family in dict.fromkeys(name for rows in cells for name in rows):
        present = [rows.get(family) for rows in cells]
        chance = next(row.chance for row in present if row)
        table.add_row(family, *(success_cell(row) for row in present), f"{chance:.2f}")
    stopped = [
        f"{policy.policy} {policy.anytime95[0]:.2f}-{policy.anytime95[1]:.2f}"
        for policy in tables
        if policy.anytime95 is not None
    ]
    if stopped:
        table.caption = f"mean over tasks, in an interval that allows for stopping early: {', '.join(stopped)}"
    return table


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
    cells = [{row.name: row for row in table.families} for table in tables]
    lines = _head("family", *(table.policy for table in tables), "chance")
    for family in dict.fromkeys(name for rows in cells for name in rows):
        present = [rows.get(family) for rows in cells]
        chance = next(row.chance for row in present if row)
        lines.append(_row(family, *map(success_cell, present), f"{chance:.2f}"))
    if comparisons:
        lines += ["", *_head("family", "minus", "pairs", "difference (95 %)", "McNemar's p")]
        for one in comparisons:
            against = f"{one.first} - {one.second}"
            lines.append(_row(one.family, against, str(one.pairs), difference_cell(one), f"{one.p_value:.2g}"))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _head(*headings: str) -> list[str]:
    return [_row(*headings), "|---" * len(headings) + "|"]
