"""A world that does not wait: what is played when, and that a world that waits is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ipvla.contract import HAND, Contract
from ipvla.rollout.chunk_player import ChunkPlayer, Pace
from ipvla.rollout.chunking import ChunkingConfig, EnsembleConfig, SwitchConfig
from ipvla.rollout.episode import Answer, EpisodeId, run_episode
from ipvla.rollout.latency import Latency, hold_action
from ipvla.rollout.policy_server import PolicyServer
from ipvla.sim.simulator import StepOutcome, Task
from ipvla.types import EpisodeResult, EpisodeSpec, Observation
from tests.rollout.point import PointPolicy, PointSimulator

CHUNK, EXECUTE, HORIZON = 8, 4, 40
#: A hand without a gripper, of one dimension.
TERMS = Contract((), action_size=1, gripper="none", state_size=2)
SPEC = EpisodeSpec("point", "recall_go", 2, trial=2)


class EndlessSimulator(PointSimulator):
    """Nothing is ever decided."""

    def __init__(self) -> None:
        super().__init__("recall_go")
        self.task = Task("recall_go", "recall", ("go",), HORIZON, 0.5)

    def step(self, action: np.ndarray) -> StepOutcome:
        super().step(action)
        return StepOutcome(success=False, failure=False)


def said(t: int, i: int) -> float:
    """The i-th action of the answer to the observation of control step t; never 0."""
    return 1 + 100 * t + i


def answer(observation: Observation, policy_step: int) -> Answer:
    chunk = np.array([[said(observation.t, i)] for i in range(CHUNK)], np.float32)
    return Answer(chunk, EXECUTE)


def play(
    latency: Latency, chunking: ChunkingConfig | None = None, act: Callable[..., Answer] = answer
) -> EpisodeResult:
    pace = Pace(latency, chunking or SwitchConfig())
    return run_episode(EndlessSimulator(), SPEC, act, pace=pace, terms=TERMS)


def played(result: EpisodeResult) -> list[float]:
    assert result.trace is not None
    return [float(action[0]) for action in result.trace.actions]


class TestAWorldThatWaits:
    def test_nothing_changes_bit_for_bit(self) -> None:
        def run(pace: Pace) -> EpisodeResult:
            server = PolicyServer(PointPolicy())

            def act(observation: Observation, step: int) -> np.ndarray:
                assert observation.ahead is None
                (chunk,) = server.forward([server.admit(EpisodeId("a"), step, observation)])
                assert isinstance(chunk, np.ndarray)
                return chunk

            return run_episode(PointSimulator("recall_go"), SPEC, act, pace=pace, terms=TERMS)

        plain, rest = run(Pace()), run(Pace(Latency((0,), "rest")))
        assert plain == replace(rest, wall_s=plain.wall_s, policy_s=plain.policy_s, sim_cpu_s=plain.sim_cpu_s)
        for trace in (plain.trace, rest.trace):
            assert trace is not None
            assert trace.actions.tobytes() == np.ones((5, 1), np.float32).tobytes()
            assert trace.asked_t.tolist() == [0, 2, 4]
            assert (trace.latency, trace.call) == (None, None)

    def test_its_results_say_nothing_of_it(self) -> None:
        assert Pace().conditions() == Pace(Latency((0, 0), "rest")).conditions() == {}

    def test_an_answer_begins_at_its_observation(self) -> None:
        assert played(play(Latency())) == [said(t - t % EXECUTE, t % EXECUTE) for t in range(HORIZON)]


class TestHold:
    @pytest.mark.parametrize("delay", [1, 3, 7])
    def test_the_robot_keeps_still_for_so_long_and_then_plays_the_answer(self, delay: int) -> None:
        result, period = play(Latency((delay,), "hold")), delay + EXECUTE
        for t, value in enumerate(played(result)):
            asked, since = t - t % period, t % period
            assert value == (0 if since < delay else said(asked, since - delay)), t
        assert result.trace is not None
        assert result.trace.asked_t.tolist() == list(range(0, HORIZON, period))

    def test_a_hand_stops_and_its_gripper_stays(self) -> None:
        seen = Observation({}, np.zeros(8, np.float32), "go", 0)
        last = np.array([0.3, -0.2, 0.1, 0, 0, 0.5, 1.0], np.float32)
        assert hold_action(HAND, seen, last).tolist() == [0, 0, 0, 0, 0, 0, 1]
        assert hold_action(HAND, seen, None).tolist() == [0, 0, 0, 0, 0, 0, -1], "open at first"
        published = replace(HAND, gripper="open_is_one")
        assert hold_action(published, seen, None).tolist() == [0, 0, 0, 0, 0, 0, 1]
        assert not hold_action(replace(HAND, gripper="none"), seen, last).any()

    def test_joints_stay_where_they_were_sent_or_are(self) -> None:
        arm = Contract((), action="joints", action_size=3, gripper="none", state="other", state_size=3)
        seen = Observation({}, np.array([0.1, 0.2, 0.3], np.float32), "go", 0)
        last = np.array([1.0, 2.0, 3.0], np.float32)
        assert hold_action(arm, seen, last).tolist() == [1, 2, 3]
        np.testing.assert_array_equal(hold_action(arm, seen, None), seen.proprio)
        with pytest.raises(ValueError, match="nothing tells where the robot is before it moves"):
            hold_action(arm, replace(seen, proprio=np.zeros(9, np.float32)), None)
        with pytest.raises(ValueError, match="what keeps a robot still whose actions are 'other'"):
            hold_action(replace(arm, action="other"), seen, None)


class TestRest:
    @pytest.mark.parametrize("delay", [1, 2, 4])
    def test_the_action_of_a_step_rests_on_the_newest_observation_that_is_old_enough(self, delay: int) -> None:
        result = play(Latency((delay,), "rest"))
        assert result.trace is not None
        assert played(result)[:delay] == [0] * delay, "there is no chunk before the first"
        begins = delay  # the first answer's own first action
        for t, value in enumerate(played(result)[begins:], begins):
            asks = [asked for asked in result.trace.asked_t if asked + delay <= t]
            since = t - delay if len(asks) == 1 else t - asks[-1]
            assert value == said(asks[-1], since), t
        assert result.trace.asked_t.tolist() == [0, *range(delay + EXECUTE, HORIZON, EXECUTE)]

    def test_a_chunk_that_is_over_before_the_answer_is_there_is_followed_by_stillness(self) -> None:
        values = played(play(Latency((6,), "rest")))
        assert values[:6] == [0] * 6
        assert values[6:14] == [said(0, i) for i in range(8)], "asked again at 10, with 4 actions left"
        assert values[14:16] == [0, 0], "the answer is there at 16"
        assert values[16:20] == [said(10, i) for i in range(4, 8)], "of which 4 are over"

    def test_with_answers_that_are_all_of_the_rest_no_action_is_left_out(self) -> None:
        def shorter(observation: Observation, step: int) -> np.ndarray:
            return answer(observation, step).chunk[:2]

        values = played(play(Latency((3,), "rest"), act=shorter))
        assert values[:8] == [0, 0, 0, said(0, 0), said(0, 1), 0, 0, 0]
        assert values[8:10] == [said(5, 0), said(5, 1)]


class TestDrawn:
    def test_every_call_draws_and_the_same_episode_draws_the_same(self) -> None:
        latency = Latency((0, 1, 1, 5), "hold")
        drawn = [latency.drawn("recall/a/0/7", call) for call in range(400)]
        assert drawn == [latency.drawn("recall/a/0/7", call) for call in range(400)]
        assert drawn != [latency.drawn("recall/a/0/8", call) for call in range(400)]
        assert 160 < drawn.count(1) < 240, "as often as it is listed"
        again = replace(SPEC, attempt=1)
        assert again.key == SPEC.key

    @pytest.mark.parametrize("meanwhile", ["hold", "rest"])
    def test_the_record_says_when_each_answer_was_there_and_whose_each_action_is(self, meanwhile: str) -> None:
        one, two = (play(Latency((0, 1, 3), meanwhile)) for _ in range(2))
        assert one.trace is not None
        assert two.trace is not None
        for name, array in vars(one.trace).items():
            if name not in ("step_s", "answer_s"):
                np.testing.assert_array_equal(array, getattr(two.trace, name), err_msg=name)
        latency, call, asked = one.trace.latency, one.trace.call, one.trace.asked_t
        assert latency is not None
        assert call is not None
        assert set(latency.tolist()) == {0, 1, 3}
        for t, (value, of) in enumerate(zip(played(one), call, strict=True)):
            if of < 0:
                assert value == 0
                continue
            assert int(value - 1) // 100 == asked[of], "the observation that it rests on"
            assert t - asked[of] >= latency[of]
        first = [int(np.flatnonzero(call == of)[0]) for of in range(call.max() + 1)]
        assert [t - asked[of] for of, t in enumerate(first)] == latency[: len(first)].tolist()

    def test_the_policy_is_told_the_longest_and_never_the_drawn_one(self) -> None:
        told = set()

        def act(observation: Observation, step: int) -> Answer:
            assert observation.ahead is not None
            told.add(observation.ahead.delay)
            return answer(observation, step)

        play(Latency((1, 2), "rest"), act=act)
        assert told == {2}


class TestEnsemble:
    def test_an_action_is_the_mean_of_what_all_answers_say_of_its_step(self) -> None:
        values = played(play(Latency(), EnsembleConfig(decay=0.5)))
        weights = np.exp(-0.5 * np.arange(2))
        for t in range(EXECUTE, HORIZON):
            new, old = t - t % EXECUTE, t - t % EXECUTE - EXECUTE
            mean = np.average([said(old, t - old), said(new, t - new)], weights=weights)
            assert values[t] == pytest.approx(mean)

    def test_with_a_large_decay_the_oldest_answer_alone_counts(self) -> None:
        values = played(play(Latency(), EnsembleConfig(decay=1e3)))
        assert values[:CHUNK] == [said(0, t) for t in range(CHUNK)]
        for t in range(CHUNK, HORIZON):
            old = t - t % EXECUTE - EXECUTE
            assert values[t] == said(old, t - old)

    def test_an_answer_counts_from_its_arrival_on(self) -> None:
        values = played(play(Latency((2,), "rest"), EnsembleConfig(decay=0.0)))
        assert values[2:8] == [said(0, i) for i in range(6)]
        assert values[8] == pytest.approx((said(0, 6) + said(6, 2)) / 2)

    def test_stillness_postpones_every_answer(self) -> None:
        values = played(play(Latency((2,), "hold"), EnsembleConfig(decay=0.0)))
        assert values[6:8] == [0, 0]
        assert values[8] == pytest.approx((said(0, 4) + said(6, 0)) / 2)


class TestBadSettings:
    @pytest.mark.parametrize(
        ("steps", "meanwhile", "message"),
        [
            ((), "hold", "latency_steps is empty; give a number of control steps, 0 for none"),
            ((3, -1), "hold", "latency_steps is -1; give control steps, 0 or more"),
            ((3,), "rset", "meanwhile: 'rset' is unknown; did you mean 'rest'"),
        ],
    )
    def test_are_refused_in_one_line(self, steps: tuple[int, ...], meanwhile: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as refused:
            Latency(steps, meanwhile)
        assert "\n" not in str(refused.value)

    def test_a_robot_of_which_nobody_knows_what_keeps_it_still_is_not_kept_still(self) -> None:
        with pytest.raises(ValueError, match="nothing tells what keeps this robot still"):
            run_episode(EndlessSimulator(), SPEC, answer, pace=Pace(Latency((1,))))


def test_what_a_result_says_of_it_tells_any_two_apart() -> None:
    paces = [
        Pace(),
        Pace(Latency((2,))),
        Pace(Latency((2,), "rest")),
        Pace(Latency((2, 3), "rest")),
        Pace(chunking=EnsembleConfig()),
        Pace(chunking=EnsembleConfig(decay=0.1)),
    ]
    assert len({json.dumps(pace.conditions()) for pace in paces}) == len(paces)
    assert Pace(Latency((2, 3), "rest")).conditions() == {"latency": "2 3, rest"}


def test_a_player_starts_anew_with_every_episode() -> None:
    for _ in range(2):
        player = ChunkPlayer(Pace(Latency((1,), "rest")), "a", TERMS)
        seen = player.asks(Observation({}, np.zeros(2, np.float32), "go", 0))
        assert seen.ahead is not None
        assert len(seen.ahead.actions) == 0
        first = next(iter(player.play(seen, np.ones((4, 1), np.float32), 2)))
        assert (first.action.tolist(), first.call) == ([0], None)
