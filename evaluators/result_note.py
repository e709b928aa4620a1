"""Success as Markdown: the description of a run in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from evaluators.console import success_cell
from evaluators.paired import PairedComparison
from evaluators.success_table import SuccessTable


def result_note(tables: Sequence[SuccessTable], comparisons: Sequence[PairedComparison] = ()) -> str:
    """Family x policy with Wilson's 95 % intervals, then what policies differ by on the same layouts."""
    cells = [{row.name: row for row in table.families} for table in tables]
    lines = _head("family", *(table.policy for table in tables), "chance")
    for family in dict.fromkeys(name for rows in cells for name in rows):
        present = [rows.get(family) for rows in cells]
        chance = next(row.chance for row in present if row)
        lines.append(_row(family, *map(success_cell, present), f"{chance:.2f}"))
    if comparisons:
        lines += ["", *_head("family", "minus", "pairs", "difference (95 %)", "McNemar's p")]
        for one in comparisons:
            low, high = one.difference95
            difference = f"{one.difference:+.2f} ({low:+.2f}, {high:+.2f})"
            against = f"{one.first} - {one.second}"
            lines.append(_row(one.family, against, str(one.pairs), difference, f"{one.p_value:.2g}"))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _head(*headings: str) -> list[str]:
    return [_row(*headings), "|---" * len(headings) + "|"]
