"""Episodes to look at: Parquet tables for own analyses, and the choice of those that get a video.

A table has a row per episode of an evaluation, or a row per control step of an episode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluators.success_table import SuccessTable
from evaluators.timeline import ages
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
    before this step, null within a chunk), step_s (seconds of the simulator), action_0, action_1, ...; and of an
    episode in a world that did not wait age, control steps since the answer's observation; of one that a policy at
    two speeds played thought_age, control steps since the observation of the slow part's thought. In a world that
    did not wait these and policy_step are null where the robot kept still.
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
    if (call := trace.call) is not None:
        still = call < 0
        columns["policy_step"] = pa.array(call, mask=still)
        columns["age"] = pa.array(steps - trace.asked_t[call], mask=still)
    if trace.thought_t is not None:
        old = ages(trace)
        columns["thought_age"] = pa.array(np.nan_to_num(old).astype(np.int64), mask=np.isnan(old))
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


#: Every episode, every one that did not succeed, or this number of each kind (success or not) per task.
VideoChoice = Literal["all", "failures"] | int


@dataclass(frozen=True)
class Video:
    """The recording of one episode; `outcome` as in `EpisodeResult`, `timeline` a PNG where there is one."""

    policy: str
    task: str
    trial: int
    outcome: str
    path: Path
    timeline: bytes | None = None


def chosen_videos(table: SuccessTable, choice: VideoChoice, directory: Path) -> list[tuple[EpisodeResult, Video]]:
    """The chosen episodes of a policy in their order, each with its video's place."""
    so_far: Counter[tuple[str, bool]] = Counter()
    chosen = []
    for result in table.results:
        spec, kind = result.spec, (result.spec.task, result.success)
        so_far[kind] += 1
        if choice == "all" or (not result.success if choice == "failures" else so_far[kind] <= choice):
            path = directory / f"{spec.task}-{spec.trial}-{result.outcome}.mp4"
            chosen.append((result, Video(table.policy, spec.task, spec.trial, result.outcome, path)))
    return chosen
