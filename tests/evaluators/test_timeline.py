"""An episode on one time axis."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluators.episodes import Video, write_trace
from evaluators.report import Report
from evaluators.timeline import ages, has_timeline, thoughts, timeline
from ipvla.types import EpisodeResult, EpisodeSpec, EpisodeTrace

RESULT = EpisodeResult(EpisodeSpec("recall", "ground_red", 1, 3), "success", 6, 3, 1.0, 0.5)


def trace(**more: object) -> EpisodeTrace:
    """Six control steps, a call at every second one."""
    asked = np.array([0, 2, 4], np.int32)
    return EpisodeTrace(
        np.zeros((6, 1), np.float32), np.zeros(6, np.float32), asked, np.zeros(3, np.float32), **more
    )  # type: ignore[arg-type]


THOUGHT = np.array([0, 0, 2], np.int32)  # the one of t = 2 took two control steps
LATE = {"latency": np.array([1, 1, 1], np.int32), "call": np.array([-1, 0, 0, 1, 1, 2], np.int32)}


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (trace(), [0, 1, 0, 1, 0, 1]),
        (trace(thought_t=THOUGHT), [0, 1, 2, 3, 2, 3]),
        (trace(**LATE), [np.nan, 1, 2, 1, 2, 1]),
        (trace(thought_t=THOUGHT, **LATE), [np.nan, 1, 2, 3, 4, 3]),
    ],
)
def test_age_is_that_of_what_each_action_rests_on(one: EpisodeTrace, expected: list[float]) -> None:
    np.testing.assert_array_equal(ages(one), expected)


def test_a_thought_lasts_from_the_first_call_that_acts_on_it_to_the_last() -> None:
    assert thoughts(trace(thought_t=THOUGHT)) == [(0, 0, 2), (2, 4, 4)]
    assert thoughts(trace()) == []


def test_there_is_a_picture_where_age_says_something() -> None:
    assert not has_timeline(trace())
    for one in (trace(thought_t=THOUGHT), trace(**LATE)):
        assert has_timeline(one)
        assert timeline(RESULT, one).startswith(b"\x89PNG")


def test_the_table_of_steps_has_the_thoughts_age(tmp_path) -> None:
    rows = pq.read_table(write_trace(trace(thought_t=THOUGHT, **LATE), tmp_path / "one.parquet")).to_pylist()
    assert [row["thought_age"] for row in rows] == [None, 1, 2, 3, 4, 3]
    rows = pq.read_table(write_trace(trace(), tmp_path / "plain.parquet")).to_pylist()
    assert "thought_age" not in rows[0]


def test_the_report_shows_it_beside_the_video(tmp_path) -> None:
    (tmp_path / "one.mp4").write_bytes(b"")
    plain = Video("gru", "ground_red", 3, "success", tmp_path / "one.mp4")
    picture = timeline(RESULT, trace(thought_t=THOUGHT))
    for video, shown in ((plain, False), (Video(*list(vars(plain).values())[:5], picture), True)):
        page = Report("Success", (), videos=[video]).write(tmp_path / "report.html").read_text()
        assert ("time axis of ground_red 3" in page) == shown
