"""What is shown while episodes are played."""

from dataclasses import replace

import pytest

from evaluators.rollout_status import RolloutStatus
from tests.evaluators.test_success_table import results


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_known_before_the_first_episode(clock):
    status = RolloutStatus(10, clock=clock)
    assert (status.played, status.success95, status.left_s, status.policy_busy) == (0, (0.0, 1.0), None, None)


def test_rates_are_of_what_is_played_now_and_success_of_everything(clock):
    status = RolloutStatus(12, results("ground_a", "ssss"), clock)
    for result in results("recall_a", "sfft"):
        clock.now += 2
        status.add(replace(result, wall_s=4.0, policy_s=1.0))
    assert (status.played, status.new, status.successes, status.total) == (8, 4, 5, 12)
    assert status.episodes_per_s == 0.5
    assert status.left_s == 8
    assert status.waiting == 0.25
    low, high = status.success95
    assert low < 5 / 8 < high
    clock.now += 100
    assert status.episodes_per_s == 0.5, "what comes after the last episode does not count"


def test_episodes_that_ran_again_are_counted(clock):
    status = RolloutStatus(3, clock=clock)
    for attempt, result in zip((0, 2, 1), results("ground_a", "sss"), strict=True):
        status.add(replace(result, spec=replace(result.spec, attempt=attempt)))
    assert status.retries == 3


def test_the_policys_load_is_that_since_it_was_last_heard_of(clock):
    status = RolloutStatus(3, clock=clock)
    for forward_s, busy in ((1.0, 0.25), (1.0, 0.0), (3.0, 0.5)):
        clock.now += 2
        assert status.unheard_s == 2
        status.hear({"forward_s": forward_s}, replicas=2)
        assert status.policy_busy == busy
    clock.now += 2
    status.hear({}, replicas=2)
    assert status.policy_busy == 0.5, "a replica that died took its count along"
