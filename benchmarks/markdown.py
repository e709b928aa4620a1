"""Lines of Markdown tables."""

from __future__ import annotations


def line(*cells: str) -> str:
    """One row."""
    return f"| {' | '.join(cells)} |"


def head(*headings: str) -> list[str]:
    """The first row, and the rule below it."""
    return [line(*headings), "|---" * len(headings) + "|"]
