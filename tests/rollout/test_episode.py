import time

import numpy as np
import pytest

from ipvla.rollout.episode import EpisodeId, InvalidActionError, run_episode
from ipvla.rollout.policy_server import PolicyServer
from ipvla.types import EpisodeSpec
from tests.rollout.point import HORIZON, PointPolicy, PointSimulator


def spec(seed: int) -> EpisodeSpec:
    return EpisodeSpec("point", "recall_go", seed, trial=seed)


def play(seed: int, act, observers=()):
    return run_episode(PointSimulator("recall_go"), spec(seed), act, observers)


def right(observation, policy_step):
    return np.ones((2, 1), np.float32)


@pytest.mark.parametrize(("seed", "outcome"), [(2, "success"), (0, "failure")])
def test_the_tasks_state_machine_decides(seed, outcome):
    result = play(seed, right)
    assert result.outcome == outcome
    assert result.success == (outcome == "success")
    assert result.steps == 5
    assert result.details["track"] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_the_horizon_ends_an_undecided_episode_even_inside_a_chunk():
    result = play(2, lambda observation, policy_step: np.zeros((5, 1), np.float32))
    assert (result.outcome, result.steps, result.policy_steps) == ("timeout", HORIZON, 3)


def test_the_policy_is_asked_once_per_chunk_with_the_step_it_is_at():
    asked = []

    def act(observation, policy_step):
        asked.append((policy_step, observation.t))
        return right(observation, policy_step)

    play(2, act)
    assert asked == [(0, 0), (1, 2), (2, 4)]


def test_what_was_played_is_told_step_by_step():
    trace = play(2, right).trace
    assert trace.actions.dtype == np.float32
    np.testing.assert_array_equal(trace.actions, np.ones((5, 1)))
    assert trace.asked_t.tolist() == [0, 2, 4]
    assert (trace.step_s.shape, trace.answer_s.shape) == ((5,), (3,))
    assert (trace.step_s > 0).all()


def test_time_is_that_of_the_episode():
    def slowly(observation, policy_step):
        time.sleep(0.02)
        return right(observation, policy_step)

    result = play(2, slowly)
    assert 0.06 <= result.policy_s <= result.wall_s
    assert result.policy_s == pytest.approx(float(result.trace.answer_s.sum()), rel=1e-4)
    assert 0 < result.sim_cpu_s < result.policy_s, "waiting for the policy is no work of the simulator"


def test_observers_see_the_reset_and_every_step_in_order():
    seen = []

    class Watcher:
        def on_reset(self, simulator):
            seen.append(simulator.t)

        def on_step(self, simulator, action, outcome):
            seen.append((simulator.t, outcome.done))

    play(2, right, [Watcher()])
    assert seen == [0, (1, False), (2, False), (3, False), (4, False), (5, True)]


@pytest.mark.parametrize("chunk", [np.zeros((0, 1)), np.zeros(3), np.array([[np.nan]]), np.array([[np.inf]])])
def test_a_chunk_that_cannot_be_played_is_refused_before_the_robot_moves(chunk):
    with pytest.raises(InvalidActionError, match="point/recall_go"):
        play(0, lambda observation, policy_step: chunk.astype(np.float32))


def test_a_protocol_plays_the_first_actions_of_a_chunk_and_refuses_a_shorter_one():
    three = np.ones((3, 1), np.float32)
    result = run_episode(PointSimulator("recall_go"), spec(2), lambda observation, step: three, execute=2)
    assert result.trace.asked_t.tolist() == [0, 2, 4]
    with pytest.raises(InvalidActionError, match=r"recall_go.*gives 3 actions per call, the protocol plays 4"):
        run_episode(PointSimulator("recall_go"), spec(2), lambda observation, step: three, execute=4)


def test_an_episode_run_through_a_server_needs_its_memory():
    server = PolicyServer(PointPolicy())

    def act(observation, policy_step):
        return server.forward([server.admit(EpisodeId("a"), policy_step, observation)])[0]

    assert play(2, act).outcome == "success"
