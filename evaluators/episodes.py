"""Every episode of an evaluation as a row of a table, for whoever wants to look at them otherwise than we do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluators.success_table import SuccessTable
from ipvla.files import replacing
from ipvla.types import EpisodeResult

#: Of the fingerprint, what tells results apart that are put into one file.
_KEPT = ("protocol", "suite_version", "profile", "policy_sha256")


def write_episodes(tables: Sequence[SuccessTable], path: Path) -> Path:
    """Writes a Parquet file with a row per policy and episode; an older one is replaced in one rename.

    Columns: policy, suite, task, trial, seed, attempt, outcome, success, steps, policy_steps, wall_s, policy_s,
    sim_cpu_s, and protocol, suite_version, profile and policy_sha256 of the results' fingerprint.
    """
    import pyarrow as pa  # takes a second
    import pyarrow.parquet as pq

    rows = [_row(table, result) for table in tables for result in table.results]
    with replacing(path) as part:
        pq.write_table(pa.Table.from_pylist(rows), part)
    return path


def _row(table: SuccessTable, result: EpisodeResult) -> dict[str, Any]:
    spec = result.spec
    return {
        "policy": table.policy,
        "suite": spec.suite,
        "task": spec.task,
        "trial": spec.trial,
        "seed": spec.seed,
        "attempt": spec.attempt,
        "outcome": result.outcome,
        "success": result.success,
        "steps": result.steps,
        "policy_steps": result.policy_steps,
        "wall_s": result.wall_s,
        "policy_s": result.policy_s,
        "sim_cpu_s": result.sim_cpu_s,
        **{name: table.fingerprint.get(name, "") for name in _KEPT},
    }
