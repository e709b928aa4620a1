"""Success under perturbations, by dimension and level, against the same initial states without any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from evaluators.console import success_cell
from evaluators.intervals import bootstrap_difference, bootstrap_mean, mcnemar_exact
from evaluators.paired import compare
from evaluators.success_table import SuccessRow, SuccessTable
from ipvla.files import write_text
from ipvla.sim.perturbations import PerturbationConfig
from ipvla.sim.simulator import Task

_TOTAL = "total"


@dataclass(frozen=True)
class RobustnessRow:
    """Of one level, or of all levels of a dimension, or of all dimensions.

    Attributes:
        dimension: by name, or "total".
        level: None for all of them.
        success: of the perturbed episodes.
        pairs: initial states that were played with and without.
        difference: success with minus success without on these, in [-1, 1].
        difference95: its bootstrap interval over initial states within tasks, each with all its levels; None if no
            task has two of them.
        p_value: McNemar's, exact; None of several levels, which are not independent.
    """

    dimension: str
    level: int | None
    success: SuccessRow
    pairs: int
    difference: float
    difference95: tuple[float, float] | None
    p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "dimension": self.dimension,
            "level": self.level,
            **self.success.to_dict(),
            "pairs": self.pairs,
            "difference": self.difference,
            "difference95": list(self.difference95) if self.difference95 else None,
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Robustness:
    """One policy's.

    Attributes:
        unperturbed: its results without perturbations.
        perturbed: and with each.
        rows: per dimension its levels and all of them, then all dimensions.
    """

    policy: str
    unperturbed: SuccessTable
    perturbed: Mapping[PerturbationConfig, SuccessTable]
    rows: tuple[RobustnessRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with everything that the counts depend on."""
        return {
            "unperturbed": self.unperturbed.record(),
            "rows": [row.to_dict() for row in self.rows],
            "fingerprints": {str(config): dict(table.fingerprint) for config, table in self.perturbed.items()},
        }

    def metrics(self, suite: str) -> dict[str, float]:
        """`robustness/<suite>/<dimension>[/<level>]`, with `/low`, `/high` and `/difference`."""
        metrics: dict[str, float] = {}
        for row in self.rows:
            name = f"robustness/{suite}/{row.dimension}" + ("" if row.level is None else f"/{row.level}")
            low, high = row.success.wilson95
            metrics |= {name: row.success.rate, f"{name}/low": low, f"{name}/high": high}
            metrics[f"{name}/difference"] = row.difference
        return metrics


def robustness(
    policy: str,
    unperturbed: SuccessTable,
    perturbed: Mapping[PerturbationConfig, SuccessTable],
    tasks: Sequence[Task],
) -> Robustness:
    """Compares each result with the unperturbed one.

    Raises:
        ValueError: none is given, or one shares no initial state with the unperturbed one.
    """
    if not perturbed:
        raise ValueError("there is no perturbed result; play at least one dimension and level")
    dimensions: dict[str, dict[int, SuccessTable]] = {}
    for config, table in perturbed.items():
        dimensions.setdefault(config.dimension, {})[config.level] = table
    rows: list[RobustnessRow] = []
    for dimension, levels in dimensions.items():
        rows += [_level(dimension, level, table, unperturbed, tasks) for level, table in sorted(levels.items())]
        rows.append(_together(dimension, [*levels.values()], unperturbed))
    rows.append(_together(_TOTAL, [*perturbed.values()], unperturbed))
    return Robustness(policy, unperturbed, dict(perturbed), tuple(rows))


def write_robustness(found: Sequence[Robustness], path: Path) -> Path:
    """Writes JSON: policy -> `Robustness.to_dict`; whole or not at all."""
    return write_text(path, json.dumps({one.policy: one.to_dict() for one in found}, indent=1))


def robustness_table(found: Robustness) -> Table:
    """Dimension x level: success with its interval, the difference to the unperturbed episodes with its own, p."""
    results = found.unperturbed.results
    whole = SuccessRow("", sum(result.success for result in results), len(results), 0.0)
    table = Table(
        title=f"{found.policy} under perturbations; unperturbed {success_cell(whole)}",
        caption="difference: to the same initial states unperturbed. Rows of all levels count an initial state "
        "once per level; their interval of success takes these for independent",
    )
    for heading in ("dimension", "level", "success (95 %)", "pairs", "difference (95 %)", "p"):
        table.add_column(heading, justify="left" if heading == "dimension" else "right")
    for row in found.rows:
        table.add_row(
            row.dimension,
            "all" if row.level is None else str(row.level),
            success_cell(row.success),
            str(row.pairs),
            _difference_cell(row),
            "" if row.p_value is None else f"{row.p_value:.2g}",
            end_section=row.level is None,
        )
    return table


def _difference_cell(row: RobustnessRow) -> str:
    if row.difference95 is None:
        return f"{row.difference:+.2f}"
    low, high = row.difference95
    return f"{row.difference:+.2f} ({low:+.2f}, {high:+.2f})"


def _level(
    dimension: str, level: int, table: SuccessTable, unperturbed: SuccessTable, tasks: Sequence[Task]
) -> RobustnessRow:
    compared = compare(table, unperturbed, tasks, across_protocols=True)
    counts = tuple(chain.from_iterable(comparison.tasks for comparison in compared))
    only_perturbed, only_unperturbed = (sum(task[column] for task in counts) for column in (0, 1))
    pairs = sum(map(sum, counts))
    return RobustnessRow(
        dimension,
        level,
        _counted(dimension, [table]),
        pairs,
        (only_perturbed - only_unperturbed) / pairs,
        bootstrap_difference(counts),
        mcnemar_exact(only_perturbed, only_unperturbed),
    )


def _together(dimension: str, tables: Sequence[SuccessTable], unperturbed: SuccessTable) -> RobustnessRow:
    before = {result.spec.key: result.success for result in unperturbed.results}
    changes: dict[str, dict[str, list[int]]] = {}
    for result in chain.from_iterable(table.results for table in tables):
        if (key := result.spec.key) in before:
            changes.setdefault(result.spec.task, {}).setdefault(key, []).append(result.success - before[key])
    means = [[fmean(levels) for levels in layouts.values()] for layouts in changes.values()]
    values = [*chain.from_iterable(means)]
    return RobustnessRow(
        dimension, None, _counted(dimension, tables), len(values), fmean(values), bootstrap_mean(means), None
    )


def _counted(name: str, tables: Sequence[SuccessTable]) -> SuccessRow:
    results = [*chain.from_iterable(table.results for table in tables)]
    return SuccessRow(name, sum(result.success for result in results), len(results), 0.0)
