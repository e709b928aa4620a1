"""Success rates of one policy, per task and per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from evaluators.intervals import wilson_interval
from ipvla.sim.simulator import Task
from ipvla.types import EpisodeResult


@dataclass(frozen=True)
class SuccessRow:
    """k successes in n episodes; `chance` is the rate of a policy that ignores what the family tests."""

    name: str
    k: int
    n: int
    chance: float

    @property
    def rate(self) -> float:
        return self.k / self.n

    @property
    def wilson95(self) -> tuple[float, float]:
        return wilson_interval(self.k, self.n)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: k, n, rate, wilson95, chance."""
        return {
            "k": self.k,
            "n": self.n,
            "rate": self.rate,
            "wilson95": list(self.wilson95),
            "chance": self.chance,
        }


@dataclass(frozen=True)
class SuccessTable:
    """One policy's results.

    Attributes:
        policy: its name in reports.
        tasks, families: rows in the suite's order; a task or family without results has none.
        results: the episodes behind the rows.
        fingerprint: what the results depend on (`evaluators.success`).
        anytime95: of an evaluation that may stop early, the interval of the mean over tasks that stays valid then.
    """

    policy: str
    tasks: tuple[SuccessRow, ...]
    families: tuple[SuccessRow, ...]
    results: tuple[EpisodeResult, ...]
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    anytime95: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Family -> its row, as JSON values."""
        return {row.name: row.to_dict() for row in self.families}

    @property
    def subgoals(self) -> dict[str, float]:
        """Task -> mean share of sub-goals reached, in [0, 1], of tasks whose episodes report it in their details.

        LIBERO-Mem's measure (arXiv 2511.11478), beside success.
        """
        shares: dict[str, list[float]] = {row.name: [] for row in self.tasks}
        for result in self.results:
            if "subgoals" in result.details:
                share = result.details["subgoals_reached"] / result.details["subgoals"]
                shares[result.spec.task].append(share)
        return {task: fmean(reached) for task, reached in shares.items() if reached}

    def record(self) -> dict[str, Any]:
        """JSON values: the counts, and everything that they depend on."""
        return {
            **({"subgoals": self.subgoals} if self.subgoals else {}),
            "protocol": self.fingerprint.get("protocol"),
            "fingerprint": dict(self.fingerprint),
            "anytime95": list(self.anytime95) if self.anytime95 else None,
            "families": self.to_dict(),
            "tasks": {row.name: row.to_dict() for row in self.tasks},
        }


def tabulate(
    policy: str, tasks: Sequence[Task], results: Sequence[EpisodeResult], fingerprint: Mapping[str, str]
) -> SuccessTable:
    """Counts `results` by task and by family; chance is averaged over a row's episodes."""
    known = {task.name: task for task in tasks}

    def rows(name: Callable[[Task], str]) -> tuple[SuccessRow, ...]:
        groups: dict[str, list[EpisodeResult]] = {name(task): [] for task in tasks}
        for result in results:
            groups[name(known[result.spec.task])].append(result)
        return tuple(
            SuccessRow(
                group,
                k=sum(result.success for result in members),
                n=len(members),
                chance=sum(known[result.spec.task].chance for result in members) / len(members),
            )
            for group, members in groups.items()
            if members
        )

    return SuccessTable(
        policy, rows(lambda task: task.name), rows(lambda task: task.family), tuple(results), dict(fingerprint)
    )
