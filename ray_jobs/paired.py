"""`python -m ray_jobs.paired`: evaluated policies against each other, on the initial states that both have played.

    ipvla paired --evaluations "[recall/gru, recall/none]"
    ipvla paired --evaluations "[spatial/mine, all.sqlite]" --across_protocols true --out paired.json

Reads journals, plays nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rich.console import Console

from evaluators.console import comparison_table, success_table
from evaluators.paired import PairedComparison, compare, write_success
from evaluators.success_table import SuccessTable, tabulate
from ipvla.rollout.journal import Journal, JournalError, labelled
from ipvla.sim.protocols import ProtocolError, diff, recorded_protocol
from ipvla.sim.simulator import Task
from ipvla.sim.suites import recorded_entry
from ipvla.storage import StorageRoots
from ipvla.types import EpisodeResult
from ray_jobs.command_line.cli import run


@dataclass(frozen=True)
class PairedConfig(StorageRoots):
    """Whose results.

    Attributes:
        evaluations: two or more, each `STUDY/POLICY` of `run_root_dir`, `STUDY/POLICY/LABEL` of results that were
            given one, or the path of a journal.
        across_protocols: also compares results of different protocols, and says in what these differ.
        out: a JSON file to write it all to, as `ray_jobs.evaluate` does to `success.json`; none by default.
    """

    evaluations: tuple[str, ...] = ()
    across_protocols: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        if len(set(self.evaluations)) < max(len(self.evaluations), 2):
            raise ValueError(
                f"evaluations is {list(self.evaluations)}; name two or more, all different, for example "
                '--evaluations "[recall/gru, recall/none]"'
            )

    def journal(self, evaluation: str) -> Path:
        """Where its records are."""
        given = Path(evaluation).expanduser()
        if given.is_file():
            return given
        of_label = self.runs / given.parent / labelled("episodes.sqlite", given.name)
        return of_label if of_label.is_file() else self.runs / evaluation / "episodes.sqlite"


def paired(config: PairedConfig, console: Console) -> tuple[PairedComparison, ...]:
    """Prints success, every pair's comparison, and what else is not the same.

    Raises:
        JournalError: there is no such evaluation, or it has no episodes.
        ProtocolError: they were played by different protocols, although that was not asked for.
        ValueError: two of them share no initial state.
    """
    tables, tasks = [], dict[str, Task]()
    for evaluation in config.evaluations:
        with Journal.existing(config.journal(evaluation)) as journal:
            results, fingerprint = journal.results(), journal.fingerprint
        if not results:
            raise JournalError(f"{journal.path} has no episodes yet; evaluate the policy first")
        played = _tasks(config, results, fingerprint)
        tables.append(tabulate(evaluation, played, results, fingerprint))
        tasks |= {task.name: task for task in played}
    comparisons = tuple(
        comparison
        for one, other in combinations(tables, 2)
        for comparison in compare(one, other, [*tasks.values()], across_protocols=config.across_protocols)
    )
    console.print(success_table(tables), comparison_table(comparisons))
    for one, other in combinations(tables, 2):
        for line in _differences(one, other):
            console.print(line, style="yellow", markup=False, highlight=False)
    if config.out is not None:
        console.print(f"written: {write_success(tables, comparisons, config.out.expanduser())}", markup=False)
    return comparisons


def _tasks(config: PairedConfig, results: list[EpisodeResult], fingerprint: Mapping[str, str]) -> list[Task]:
    """Those that were played, in the suite's order; the suite is opened for those alone that it does not list."""
    suite = {**fingerprint, "suite": results[0].spec.suite}
    entry, names = recorded_entry(suite), {result.spec.task for result in results}
    listed = [task for task in entry.tasks() if task.name in names]
    unlisted = sorted(names - {task.name for task in listed})
    return listed + ([*map(entry.load(config.cache).task, unlisted)] if unlisted else [])


def _differences(one: SuccessTable, other: SuccessTable) -> list[str]:
    """What results depend on and is not the same for both, a protocol's fields one by one."""
    pairs = {
        name: (one.fingerprint.get(name), other.fingerprint.get(name))
        for name in dict.fromkeys([*one.fingerprint, *other.fingerprint])
        if name != "policy_sha256"
    }
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    protocols = differing.pop("protocol", None)
    fields = {}
    if protocols is not None:
        try:
            fields = diff(*(recorded_protocol(str(protocol)) for protocol in protocols))
        except ProtocolError as error:
            fields = {f"protocol ({error})": protocols}
    return [
        f"{name}: {a} for {one.policy}, {b} for {other.policy}" for name, (a, b) in {**fields, **differing}.items()
    ]


def main(config: PairedConfig) -> None:
    """Compares on standard output."""
    paired(config, Console())


if __name__ == "__main__":
    run(PairedConfig, main, __doc__)
