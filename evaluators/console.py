"""Success and paired comparisons as tables on the console."""

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
            name, str(c.pairs), str(c.only_first), str(c.only_second), _difference(c), f"{c.p_value:.2g}"
        )
    return table


def _difference(comparison: PairedComparison) -> str:
    low, high = comparison.difference95
    return f"{comparison.difference:+.2f} ({low:+.2f}, {high:+.2f})"
