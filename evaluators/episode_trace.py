"""An episode's trace as a table: a row per control step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ipvla.files import replacing
from ipvla.types import EpisodeTrace


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
