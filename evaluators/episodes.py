"""Parquet tables for own analyses: a row per episode of an evaluation, a row per control step of an episode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.success_table import SuccessTable
from ipvla.files import replacing
from ipvla.types import EpisodeResult, EpisodeTrace

#: The part of the fingerprint that distinguishes results in one file.
_FINGERPRINT = ("protocol", "suite_version", "profile", "policy_sha256")


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


def write_trace(trace: EpisodeTrace, path: Path) -> Path:
    """Writes a Parquet file; an older one is replaced in one rename.

    Columns: t, policy_step (the answer that the action belongs to, from 0), answer_s (seconds that the policy took
    before this step, null within a chunk), step_s (seconds of the simulator), action_0, action_1, ...
    """
    import pyarrow as pa  # takes a second
    import pyarrow.parquet as pq

    steps = np.arange(len(trace.actions))
    policy_step = np.searchsorted(trace.asked_t, steps, side="right") - 1
    begins = np.isin(steps, trace.asked_t)
    columns = {
        "t": steps,
        "policy_step": policy_step,
        "answer_s": pa.array(trace.answer_s[policy_step], mask=~begins),
        "step_s": trace.step_s,
        **{f"action_{i}": column for i, column in enumerate(trace.actions.T)},
    }
    with replacing(path) as part:
        pq.write_table(pa.table(columns), part)
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
        **{name: table.fingerprint.get(name, "") for name in _FINGERPRINT},
    }
