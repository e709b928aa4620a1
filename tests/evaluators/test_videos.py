"""Videos of as many episodes as asked for."""

from pathlib import Path

import pytest

from evaluators.episodes import chosen_videos
from tests.evaluators.test_success_table import table


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (0, []),
        (1, ["ground_a-0-success", "ground_a-2-failure", "recall_a-0-timeout"]),
        (2, ["ground_a-0-success", "ground_a-1-success", "ground_a-2-failure", "ground_a-3-timeout",
             "recall_a-0-timeout"]),
        ("failures", ["ground_a-2-failure", "ground_a-3-timeout", "recall_a-0-timeout"]),
        ("all", ["ground_a-0-success", "ground_a-1-success", "ground_a-2-failure", "ground_a-3-timeout",
                 "recall_a-0-timeout"]),
    ],
)  # fmt: skip
def test_episodes_are_chosen_in_their_order(choice, names):
    chosen = chosen_videos(table("gru", ground_a="ssft", recall_a="t"), choice, Path("videos"))
    assert [video.path for _, video in chosen] == [Path("videos", f"{name}.mp4") for name in names]
    for result, video in chosen:
        assert (video.policy, video.task, video.trial, video.outcome) == (
            "gru", result.spec.task, result.spec.trial, result.outcome,
        )  # fmt: skip
