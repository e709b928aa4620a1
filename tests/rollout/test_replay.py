"""An episode is played again from what its trace recorded, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest

from ipvla.rollout.episode import ReplayError, replay_episode
from ipvla.rollout.recorder import VideoRecorder
from tests.rollout.point import PointSimulator
from tests.rollout.test_episode import play, right


def test_the_same_steps_are_played_without_a_policy():
    result, simulator, recorder = play(2, right), PointSimulator("recall_go"), VideoRecorder(size=16, every=1)
    replay_episode(simulator, result, result.trace.actions, [recorder])
    assert simulator.details() == result.details
    assert len(recorder.frames) == 1 + result.steps


@pytest.mark.parametrize(
    ("changes", "now"),
    [({"outcome": "failure"}, "success after 5"), ({"steps": 4}, "success after 5")],
)
def test_an_episode_that_goes_another_way_is_told(changes, now):
    result = play(2, right)
    with pytest.raises(ReplayError, match=rf"point/recall_go/2/2 ended as .* now lead to {now}"):
        replay_episode(PointSimulator("recall_go"), replace(result, **changes), result.trace.actions)
    with pytest.raises(ReplayError, match="now lead to timeout after 5"):
        replay_episode(PointSimulator("recall_go"), result, np.zeros((5, 1), np.float32))
