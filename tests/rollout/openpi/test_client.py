"""An evaluation whose policy is a server somewhere else."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from ipvla.contract import HAND, ContractError, Pictures
from ipvla.rollout.endpoint import Serving
from ipvla.rollout.evaluation import SimPool, evaluate_episodes
from ipvla.rollout.journal import Journal
from ipvla.rollout.openpi.client import OpenpiClient, OpenpiError, OpenpiSource
from ipvla.rollout.sim_pool import JobFailedError
from ipvla.sim.protocols import load_protocol
from ipvla.types import EpisodeSpec, Observation
from tests.rollout.openpi.served import serving
from tests.rollout.point import PointPolicy, Points


def observation(cue, t=0):
    return Observation({}, np.array([0, cue], np.float32), "go", t)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_episodes_are_those_of_a_policy_that_is_here(tmp_path):
    specs = [EpisodeSpec("point", "ground_go", seed, trial=seed) for seed in range(12)]
    with serving() as (server, url), SimPool(Points(), 2, cpus_per_simulator=0) as pool:
        service = OpenpiSource(url).serve(Serving())
        with Journal(tmp_path / "journal.sqlite", {}) as journal:
            results = evaluate_episodes(specs, pool, service, journal)
        sessions = server.status()["sessions"]
    assert [result.outcome for result in results] == ["success" if s % 3 != 1 else "timeout" for s in range(12)]
    assert sessions == 0, "a connection per episode, and none is left"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_server_that_goes_away_is_named(tmp_path):
    with serving() as (_, url):
        pass
    specs = [EpisodeSpec("point", "ground_go", 0, trial=0)]
    with (
        SimPool(Points(), 1, cpus_per_simulator=0) as pool,
        Journal(tmp_path / "journal.sqlite", {}) as journal,
        pytest.raises(JobFailedError, match=f"no openpi server answers at {url}"),
    ):
        evaluate_episodes(specs, pool, OpenpiSource(url).serve(Serving()), journal)


def test_an_episode_has_its_connection_and_a_second_one_another():
    with serving() as (_, url):
        client = OpenpiClient(url)
        assert client.act("a", observation(1.0), 0).tolist() == [[1.0], [1.0]]
        assert client.act("a", observation(0.0, 2), 1)[0, 0] == 1.0
        assert client.act("b", observation(0.5), 0)[0, 0] == 0.5
        client.end("b")
        client.end("b")
        with pytest.raises(OpenpiError, match="policy step 1 of an episode that has no connection"):
            client.act("b", observation(0.0, 2), 1)


def test_what_is_sent_to_a_worker_is_the_address():
    with serving() as (_, url):
        client = OpenpiClient(url, "secret")
        client.act("a", observation(1.0), 0)
        there = pickle.loads(pickle.dumps(client))
        assert (there.url, there.token) == (url, "secret")
        assert there.act("a", observation(0.5), 0)[0, 0] == 0.5
        assert "secret" not in repr(client)
        for one in (client, there):
            one.end("a")


def test_a_result_names_the_policy_that_a_server_tells():
    with serving() as (_, url):
        assert OpenpiSource(url).sha256() == "abc"


def test_what_a_server_says_against_an_observation_is_told():
    with serving() as (_, url):
        client = OpenpiClient(url)
        with pytest.raises(OpenpiError, match=r"refuses the observation: .* send float32 \[2\]"):
            client.act("a", Observation({}, np.zeros(5, np.float32), "go", 0), 0)
        client.end("a")


def test_a_chunk_that_is_none_is_told(monkeypatch):
    monkeypatch.setattr(PointPolicy, "act", lambda self, o, memory: (np.zeros((len(o), 0, 1), np.float32), memory))
    with serving() as (_, url):
        client = OpenpiClient(url)
        assert client.act("a", observation(1.0), 0).shape == (0, 1), "the episode refuses to play it"
        client.end("a")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ws://127.0.0.1:9", "no openpi server answers"),
        ("http://127.0.0.1:9", "no address of an openpi server; give ws://HOST:PORT"),
    ],
)
def test_an_address_that_is_none(url, reason):
    with pytest.raises(OpenpiError, match=reason):
        OpenpiSource(url).metadata()


def test_a_server_that_wants_a_token():
    with serving(token="secret") as (_, url):
        with pytest.raises(OpenpiError, match=r"does not let us in .*IPVLA_SERVE_TOKEN"):
            OpenpiSource(url).metadata()
        assert OpenpiSource(url, "secret").sha256() == "abc"


def test_our_server_states_its_terms_and_others_speak_the_protocols_language(monkeypatch):
    offered = load_protocol("openvla").contract(HAND)
    told = {"server": "somebody's"}
    monkeypatch.setattr(OpenpiSource, "metadata", lambda source: told)
    source = OpenpiSource("ws://there")
    assert source.view(offered) == offered
    told = {"server": "ipvla"}
    assert source.view(offered) == replace(offered, gripper="environment"), "one of an earlier version"
    told = {"server": "ipvla", "contract": replace(HAND, cameras=("agentview",)).to_dict()}
    view = source.view(offered)
    assert (view.pictures, view.gripper, view.cameras) == (Pictures(), "environment", ("agentview",))
    told = {"server": "ipvla", "contract": replace(HAND, action_size=14).to_dict()}
    with pytest.raises(ContractError, match="at ws://there gives 14 numbers per action, recall takes 7"):
        source.view(offered, "recall")
