"""Two policies on the same layouts: McNemar's test and the difference per family."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluators.intervals import bootstrap_difference, mcnemar_exact
from evaluators.success_table import SuccessTable
from ipvla.files import write_text
from ipvla.sim.protocols import ProtocolError
from ipvla.sim.simulator import Task


@dataclass(frozen=True)
class PairedComparison:
    """Layouts that both policies played, and those on which only one succeeded.

    Attributes:
        tasks: per task the layouts on which only the first succeeded, only the second, and either both or none.
    """

    family: str
    first: str
    second: str
    tasks: tuple[tuple[int, int, int], ...]

    @property
    def pairs(self) -> int:
        return sum(map(sum, self.tasks))

    @property
    def only_first(self) -> int:
        return sum(task[0] for task in self.tasks)

    @property
    def only_second(self) -> int:
        return sum(task[1] for task in self.tasks)

    @property
    def p_value(self) -> float:
        """Exact, two-sided: how surprising the discordant pairs are if the policies are equally good."""
        return mcnemar_exact(self.only_first, self.only_second)

    @property
    def difference(self) -> float:
        """The first success rate minus the second, in [-1, 1]."""
        return (self.only_first - self.only_second) / self.pairs

    @property
    def difference95(self) -> tuple[float, float] | None:
        """Its bootstrap interval; None if no task has two layouts."""
        return bootstrap_difference(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "pairs": self.pairs,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "difference": self.difference,
            "difference95": list(interval) if (interval := self.difference95) else None,
            "p_value": self.p_value,
        }


def compare(
    first: SuccessTable, second: SuccessTable, tasks: Sequence[Task], *, across_protocols: bool = False
) -> list[PairedComparison]:
    """One comparison per family with shared layouts.

    Args:
        across_protocols: the policies may have been played by different protocols, one of them perturbed, or in a
            world that waits longer for it.

    Raises:
        ProtocolError: they were, and `across_protocols` is False.
        ValueError: the policies share no layout, or played different versions of a suite.
    """
    played_by = [table.fingerprint.get("protocol") for table in (first, second)]
    if played_by[0] != played_by[1] and not across_protocols:
        raise ProtocolError(
            f"{first.policy} was played by protocol {played_by[0]}, {second.policy} by {played_by[1]}: their "
            "difference is not one of policies; play both by the same protocol, or ask for across_protocols"
        )
    for name in ("perturbation", "latency"):
        played_with = [table.fingerprint.get(name) for table in (first, second)]
        if played_with[0] != played_with[1] and not across_protocols:
            raise ProtocolError(
                f"{first.policy} was played with {name} {played_with[0]}, {second.policy} with {played_with[1]}: "
                "their difference is not one of policies; play both with the same one, or ask for across_protocols"
            )
    versions = [table.fingerprint.get("suite_version") for table in (first, second)]
    if versions[0] != versions[1]:
        raise ValueError(
            f"{first.policy} was played on version {versions[0]} of the suite, {second.policy} on {versions[1]}: "
            "the same trial need not be the same layout; play both on the same version"
        )
    families = {task.name: task.family for task in tasks}
    second_success = {result.spec.key: result.success for result in second.results}
    pairs: dict[str, dict[str, Counter[int]]] = {}
    for result in first.results:
        if result.spec.key in second_success:
            of_tasks = pairs.setdefault(families[result.spec.task], {})
            of_tasks.setdefault(result.spec.task, Counter())[result.success - second_success[result.spec.key]] += 1
    if not pairs:
        raise ValueError(
            f"{first.policy} and {second.policy} share no layout; evaluate both on the same suite and tasks"
        )
    return [
        PairedComparison(
            family,
            first.policy,
            second.policy,
            tuple((outcomes[1], outcomes[-1], outcomes[0]) for outcomes in of_tasks.values()),
        )
        for family, of_tasks in pairs.items()
    ]


def write_success(tables: Sequence[SuccessTable], comparisons: Sequence[PairedComparison], path: Path) -> Path:
    """Writes JSON: `policies`, a `SuccessTable.record` of each, and `comparisons`; whole or not at all."""
    record = {
        "policies": {table.policy: table.record() for table in tables},
        "comparisons": [comparison.to_dict() for comparison in comparisons],
    }
    return write_text(path, json.dumps(record, indent=1))
