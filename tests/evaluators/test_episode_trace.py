"""A trace as a table that whoever has pandas can read."""

import numpy as np
import pyarrow.parquet as pq

from evaluators.episodes import write_trace
from ipvla.types import EpisodeTrace


def test_every_control_step_is_a_row_with_its_action_and_times(tmp_path):
    trace = EpisodeTrace(
        actions=np.arange(10, dtype=np.float32).reshape(5, 2),
        step_s=np.full(5, 0.5, np.float32),
        asked_t=np.array([0, 2, 4], np.int32),
        answer_s=np.array([0.125, 0.25, 0.375], np.float32),
    )
    path = write_trace(trace, tmp_path / "replays" / "one.parquet")
    rows = pq.read_table(path).to_pylist()
    assert [row["policy_step"] for row in rows] == [0, 0, 1, 1, 2]
    assert [row["answer_s"] for row in rows] == [0.125, None, 0.25, None, 0.375]
    assert rows[3] == {"t": 3, "policy_step": 1, "answer_s": None, "step_s": 0.5, "action_0": 6.0, "action_1": 7.0}
    assert [p.name for p in path.parent.iterdir()] == ["one.parquet"]


def test_of_a_world_that_did_not_wait_it_says_whose_each_action_is_and_how_old(tmp_path):
    trace = EpisodeTrace(
        actions=np.zeros((6, 1), np.float32),
        step_s=np.full(6, 0.5, np.float32),
        asked_t=np.array([0, 3], np.int32),
        answer_s=np.array([0.125, 0.25], np.float32),
        latency=np.array([1, 2], np.int32),
        call=np.array([-1, 0, 0, 0, 0, 1], np.int32),
    )
    rows = pq.read_table(write_trace(trace, tmp_path / "late.parquet")).to_pylist()
    assert [row["policy_step"] for row in rows] == [None, 0, 0, 0, 0, 1]
    assert [row["age"] for row in rows] == [None, 1, 2, 3, 4, 2]
