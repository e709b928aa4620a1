import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.models.action_tokens import ActionTokenError
from ipvla.rollout import policy_actor
from ipvla.rollout.episode import EpisodeId, InvalidActionError
from ipvla.rollout.policy_actor import PolicyActor, PolicySource
from ipvla.rollout.policy_server import CapacityError, PolicyServer, StaleEpisodeError
from ipvla.types import Observation
from tests.rollout.point import PointPolicy, RecurrentPolicy, load_fixed_left, load_point


def observation(episode: int, step: int) -> Observation:
    values = np.random.default_rng([episode, step]).normal(size=2).astype(np.float32)
    return Observation({}, values, "go", step)


def alone(episode: int, steps: int) -> list[np.ndarray]:
    """The episode's actions when nobody else is there."""
    server = PolicyServer(RecurrentPolicy())
    return [server.forward([server.admit(EpisodeId("x"), t, observation(episode, t))])[0] for t in range(steps)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True), min_size=1, max_size=12))
def test_batched_in_any_company_equals_alone(batches):
    """Each batch names the episodes that happen to wait together; they join and lag behind as they like."""
    server, answers = PolicyServer(RecurrentPolicy()), {episode: [] for episode in range(5)}
    for batch in batches:
        requests = [
            server.admit(EpisodeId(str(e)), len(answers[e]), observation(e, len(answers[e]))) for e in batch
        ]
        for episode, chunk in zip(batch, server.forward(requests), strict=True):
            answers[episode].append(chunk)
    for episode, chunks in answers.items():
        for chunk, expected in zip(chunks, alone(episode, len(chunks)), strict=True):
            np.testing.assert_allclose(chunk, expected, atol=1e-6)


def test_every_row_of_memory_belongs_to_its_episode():
    server = PolicyServer(PointPolicy())
    cues = {"a": -1.0, "b": 0.5, "c": 1.0}
    server.forward(
        [
            server.admit(EpisodeId(e), 0, Observation({}, np.array([0, cue], np.float32), "", 0))
            for e, cue in cues.items()
        ]
    )
    blind = Observation({}, np.zeros(2, np.float32), "", 2)
    for order in (["c", "a"], ["b"], ["a", "b", "c"]):
        steps = {"a": {2: 1, 3: 2}, "b": {1: 1, 3: 2}, "c": {2: 1, 3: 2}}
        chunks = server.forward([server.admit(EpisodeId(e), steps[e][len(order)], blind) for e in order])
        assert [chunk[0, 0] for chunk in chunks] == [cues[e] for e in order]


def test_only_the_actions_to_be_executed_are_answered():
    server = PolicyServer(PointPolicy())
    (chunk,) = server.forward([server.admit(EpisodeId("a"), 0, observation(0, 0))])
    assert chunk.shape == (2, 1)


def test_a_policy_without_memory_is_served_too():
    server = PolicyServer(load_fixed_left(None))
    for step in range(3):
        (chunk,) = server.forward([server.admit(EpisodeId("a"), step, observation(0, step))])
        assert (chunk == -1).all()


def test_tokens_that_mean_no_action_are_an_error_of_their_own_episode_alone():
    class Writing(RecurrentPolicy):
        def act(self, observations, memory):
            if any(one.instruction == "babble" for one in observations):
                raise ActionTokenError("row 0: 3 ids are no chunk")
            return super().act(observations, memory)

    server = PolicyServer(Writing())
    requests = [server.admit(EpisodeId(name), 0, observation(e, 0)) for e, name in enumerate("abc")]
    requests[1] = replace(requests[1], observation=replace(requests[1].observation, instruction="babble"))
    first, bad, third = server.forward(requests)
    np.testing.assert_allclose(first, alone(0, 1)[0], atol=1e-6)
    np.testing.assert_allclose(third, alone(2, 1)[0], atol=1e-6)
    assert isinstance(bad, InvalidActionError)
    assert "b: row 0: 3 ids are no chunk" in str(bad)
    server.admit(EpisodeId("b"), 0, observation(1, 0))  # its memory is as before


class TestStale:
    @pytest.fixture
    def server(self):
        server = PolicyServer(RecurrentPolicy())
        server.forward([server.admit(EpisodeId("a"), 0, observation(0, 0))])
        return server

    @pytest.mark.parametrize("step", [0, 2, 7])
    def test_a_repeated_or_skipped_step_is_refused_and_changes_nothing(self, server, step):
        with pytest.raises(StaleEpisodeError, match="step 1 comes next"):
            server.admit(EpisodeId("a"), step, observation(0, step))
        (chunk,) = server.forward([server.admit(EpisodeId("a"), 1, observation(0, 1))])
        np.testing.assert_allclose(chunk, alone(0, 2)[1], atol=1e-6)

    def test_an_unknown_episode_is_never_started_in_its_middle(self, server):
        with pytest.raises(StaleEpisodeError, match="no memory here"):
            server.admit(EpisodeId("b"), 3, observation(1, 3))
        assert len(server) == 1

    def test_an_ended_episode_is_unknown(self, server):
        server.end(EpisodeId("a"))
        assert len(server) == 0
        with pytest.raises(StaleEpisodeError, match="no memory here"):
            server.admit(EpisodeId("a"), 1, observation(0, 1))

    def test_a_second_request_while_the_first_waits_is_refused(self, server):
        server.admit(EpisodeId("a"), 1, observation(0, 1))
        with pytest.raises(StaleEpisodeError, match="still being answered"):
            server.admit(EpisodeId("a"), 1, observation(0, 1))

    def test_an_episode_that_ends_while_it_waits_does_not_come_back(self, server):
        request = server.admit(EpisodeId("a"), 1, observation(0, 1))
        server.end(EpisodeId("a"))
        server.forward([request])
        assert len(server) == 0

    def test_a_forward_that_raises_leaves_the_memory_as_it_was(self, server):
        bad = Observation({}, np.zeros(3, np.float32), "", 2)
        with pytest.raises(RuntimeError):
            server.forward([server.admit(EpisodeId("a"), 1, bad)])
        (chunk,) = server.forward([server.admit(EpisodeId("a"), 1, observation(0, 1))])
        np.testing.assert_allclose(chunk, alone(0, 2)[1], atol=1e-6)


class TestLeases:
    def test_an_episode_nobody_speaks_of_is_forgotten_but_not_one_that_waits(self):
        server = PolicyServer(RecurrentPolicy(), lease_s=10)
        server.forward(
            [server.admit(EpisodeId(e), 0, observation(0, 0), now_s=0) for e in ("gone", "alive", "waiting")]
        )
        server.forward([server.admit(EpisodeId("alive"), 1, observation(0, 1), now_s=8)])
        server.admit(EpisodeId("waiting"), 1, observation(0, 1), now_s=1)
        assert server.expire(now_s=10) == []
        assert server.expire(now_s=12) == [EpisodeId("gone")]
        assert EpisodeId("alive") in server
        assert EpisodeId("waiting") in server
        with pytest.raises(StaleEpisodeError, match="no memory here"):
            server.admit(EpisodeId("gone"), 1, observation(0, 1))

    def test_there_is_room_for_so_many_episodes_and_those_under_way_go_on(self):
        server = PolicyServer(RecurrentPolicy(), capacity=2)
        for name in "ab":
            server.forward([server.admit(EpisodeId(name), 0, observation(0, 0))])
        assert server.full
        with pytest.raises(CapacityError, match="c#0: 2 episodes are under way; wait"):
            server.admit(EpisodeId("c"), 0, observation(0, 0))
        server.forward([server.admit(EpisodeId("a"), 1, observation(0, 1))])
        server.end(EpisodeId("b"))
        server.forward([server.admit(EpisodeId("c"), 0, observation(0, 0))])


class TestActor:
    """The actor's class without Ray."""

    @pytest.fixture(autouse=True)
    def threads(self):
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    @staticmethod
    def slow(directory):
        class Slow(RecurrentPolicy):
            def act(self, observations, memory):
                time.sleep(0.05)
                return super().act(observations, memory)

        return Slow()

    def test_who_waits_while_the_model_is_busy_is_answered_together(self):
        async def run():
            actor = PolicyActor(PolicySource(self.slow, None), threads=1)
            first = asyncio.create_task(actor.act(EpisodeId("first"), 0, observation(9, 0)))
            await asyncio.sleep(0.01)
            rest = await asyncio.gather(*(actor.act(EpisodeId(str(e)), 0, observation(e, 0)) for e in range(6)))
            await first
            return rest, await actor.stats()

        rest, stats = asyncio.run(run())
        assert (stats["forwards"], stats["requests"], stats["episodes"]) == (2, 7, 7)
        assert 0 < stats["busy"] <= 1
        assert 0.1 <= stats["act_s"] <= stats["forward_s"], (
            "two passes; gathering and scattering are not the policy's"
        )
        assert stats["act_cpu_s"] < stats["act_s"], "it sleeps"
        for episode, chunk in enumerate(rest):
            np.testing.assert_allclose(chunk, alone(episode, 1)[0], atol=1e-6)

    def test_a_batch_is_no_larger_than_allowed_and_nobody_is_left_out(self):
        async def run():
            actor = PolicyActor(PolicySource(self.slow, None), threads=1, max_batch=2)
            chunks = await asyncio.gather(*(actor.act(EpisodeId(str(e)), 0, observation(e, 0)) for e in range(5)))
            return chunks, await actor.stats()

        chunks, stats = asyncio.run(run())
        assert stats["forwards"] >= 3
        for episode, chunk in enumerate(chunks):
            np.testing.assert_allclose(chunk, alone(episode, 1)[0], atol=1e-6)

    def test_while_another_policy_loads_the_actor_answers_and_then_refuses_what_began_before(self):
        threads = set()

        def load(directory):
            threads.add(threading.get_ident())
            time.sleep(0.2)
            return self.slow(directory)

        begun = [("a", 1), ("b", 0), ("d", 0)]

        async def run():
            actor = PolicyActor(PolicySource(load, None), threads=1, max_batch=1)
            await actor.act(EpisodeId("a"), 0, observation(0, 0))
            loading = asyncio.create_task(actor.load(PolicySource(load, None)))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            calls = [
                asyncio.create_task(actor.act(EpisodeId(name), step, observation(0, step))) for name, step in begun
            ]
            await asyncio.sleep(0.01)
            stats = await actor.stats()
            waited_s, still = time.monotonic() - began, not loading.done()
            await loading
            answers = await asyncio.gather(*calls, return_exceptions=True)
            with pytest.raises(StaleEpisodeError, match="no memory here"):
                await actor.act(EpisodeId("a"), 1, observation(0, 1))
            return stats, waited_s, still, answers, await actor.act(EpisodeId("c"), 0, observation(2, 0))

        stats, waited_s, still, answers, after = asyncio.run(run())
        assert still
        assert waited_s < 0.1, "the event loop is free while the model loads"
        assert stats["episodes"] == 3
        np.testing.assert_allclose(answers[0], alone(0, 2)[1], atol=1e-6)
        assert all(isinstance(answer, StaleEpisodeError) for answer in answers[1:]), answers
        np.testing.assert_allclose(after, alone(2, 1)[0], atol=1e-6)
        assert len(threads) == 1
        assert threading.get_ident() not in threads

    def test_a_stale_caller_does_not_harm_the_others(self):
        async def run():
            actor = PolicyActor(PolicySource(load_point, None), threads=1)
            calls = [
                actor.act(EpisodeId("a"), 0, observation(0, 0)),
                actor.act(EpisodeId("b"), 4, observation(1, 4)),
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

        good, refused = asyncio.run(run())
        assert good.shape == (2, 1)
        assert isinstance(refused, StaleEpisodeError)

    def test_a_failing_model_tells_its_callers_and_serves_on(self):
        async def run():
            actor = PolicyActor(PolicySource(self.slow, None), threads=1)
            with pytest.raises(RuntimeError):
                await actor.act(EpisodeId("a"), 0, Observation({}, np.zeros(5, np.float32), "", 0))
            return await actor.act(EpisodeId("b"), 0, observation(1, 0))

        assert asyncio.run(run()).shape == (2, 1)

    def test_a_new_episode_waits_until_there_is_room(self):
        async def run():
            actor = PolicyActor(PolicySource(load_point, None), threads=1, capacity=1)
            await actor.act(EpisodeId("first"), 0, observation(0, 0))
            second = asyncio.create_task(actor.act(EpisodeId("second"), 0, observation(1, 0)))
            await asyncio.sleep(0.05)
            assert not second.done()
            await actor.act(EpisodeId("first"), 1, observation(0, 1))
            await actor.end(EpisodeId("first"))
            return await second

        assert asyncio.run(run()).shape == (2, 1)

    def test_a_lease_that_ran_out_makes_room(self, monkeypatch):
        monkeypatch.setattr(policy_actor, "_EXPIRY_POLL_S", 0.02)

        async def run():
            actor = PolicyActor(PolicySource(load_point, None), threads=1, capacity=1, lease_s=0.1)
            await actor.act(EpisodeId("gone"), 0, observation(0, 0))
            return await asyncio.wait_for(actor.act(EpisodeId("next"), 0, observation(1, 0)), 5)

        assert asyncio.run(run()).shape == (2, 1)


def test_the_hash_of_a_policy_sees_names_and_content(tmp_path):
    def hashed(**files):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        (directory / "sub").mkdir(parents=True)
        for name, text in files.items():
            (directory / "sub" / name).write_text(text)
        return PolicySource(load_point, directory).sha256()

    assert hashed(a="1", b="2") == hashed(a="1", b="2")
    assert len({hashed(a="1", b="2"), hashed(a="2", b="1"), hashed(a="12"), hashed(c="1", b="2")}) == 4
