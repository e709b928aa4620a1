"""Two policies on the same layouts: McNemar's test per family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluators.statistics import mcnemar_exact
from evaluators.success_table import SuccessTable
from ipvla.sim.protocols import ProtocolError
from ipvla.sim.simulator import Task


@dataclass(frozen=True)
class PairedComparison:
    """Layouts that both policies played, and those on which only one succeeded.

    Attributes:
        p_value: exact, two-sided: how surprising the discordant pairs are if the policies are equally good.
    """

    family: str
    first: str
    second: str
    pairs: int
    only_first: int
    only_second: int

    @property
    def p_value(self) -> float:
        return mcnemar_exact(self.only_first, self.only_second)


def compare(
    first: SuccessTable, second: SuccessTable, tasks: Sequence[Task], *, across_protocols: bool = False
) -> list[PairedComparison]:
    """One comparison per family with shared layouts.

    Args:
        across_protocols: the policies may have been played by different protocols.

    Raises:
        ProtocolError: they were, although that was not asked for.
        ValueError: the policies share no layout.
    """
    played_by = [table.fingerprint.get("protocol") for table in (first, second)]
    if played_by[0] != played_by[1] and not across_protocols:
        raise ProtocolError(
            f"{first.policy} was played by protocol {played_by[0]}, {second.policy} by {played_by[1]}: their "
            "difference is not one of policies; play both by the same protocol, or ask for across_protocols"
        )
    families = {task.name: task.family for task in tasks}
    theirs = {result.spec.key: result.success for result in second.results}
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for result in first.results:
        if result.spec.key in theirs:
            outcome = (result.success, theirs[result.spec.key])
            pairs.setdefault(families[result.spec.task], []).append(outcome)
    if not pairs:
        raise ValueError(
            f"{first.policy} and {second.policy} share no layout; evaluate both on the same suite and tasks"
        )
    return [
        PairedComparison(
            family,
            first.policy,
            second.policy,
            pairs=len(outcomes),
            only_first=outcomes.count((True, False)),
            only_second=outcomes.count((False, True)),
        )
        for family, outcomes in pairs.items()
    ]
