"""Against openpi's own client: what a robot's computer would run."""

import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from ipvla.contract import Limits
from ipvla.rollout.openpi.server import ServerConfig
from tests.rollout.openpi.served import serving
from tests.rollout.point import PointPolicy

openpi = pytest.importorskip("openpi_client.websocket_client_policy")


def observed(x, cue=0.0, **more):
    return {"observation/state": np.array([x, cue], np.float32), "prompt": "go", **more}


def client(url, key=None):
    return openpi.WebsocketClientPolicy(url, api_key=key)


@pytest.fixture(scope="module")
def served():
    with serving() as found:
        yield found


def test_every_connection_has_a_memory_of_its_own(served):
    _, url = served
    robots = {cue: client(url) for cue in (-1.0, 0.5, 1.0)}
    for cue, robot in robots.items():
        assert robot.infer(observed(0.0, cue))["actions"].tolist() == [[cue], [cue]]
    for cue, robot in reversed(robots.items()):
        answer = robot.infer(observed(0.1))
        assert answer["actions"].dtype == np.float32
        assert answer["actions"].tolist() == [[cue], [cue]]
        assert answer["policy_step"] == 1
        assert answer["server_timing"]["infer_ms"] > 0


def test_the_metadata_come_first(served):
    assert client(served[1]).get_server_metadata() == {"server": "ipvla", "policy_sha256": "abc"}


def test_a_reset_begins_another_episode(served):
    robot = client(served[1])
    robot.infer(observed(0.0, 1.0))
    answer = robot.infer(observed(0.0, -1.0, reset=True))
    assert (answer["actions"][0, 0], answer["policy_step"]) == (-1.0, 0)


def test_time_counts_from_the_reset_what_was_answered(served, monkeypatch):
    seen = []
    monkeypatch.setattr(PointPolicy, "act", _noting(PointPolicy.act, seen))
    robot = client(served[1])
    for more in ({}, {}, {"t": 7}, {}, {"reset": True}, {}):
        robot.infer(observed(0.0, **more))
    assert seen == [0, 2, 7, 9, 0, 2]


def _noting(act, seen):
    def noted(self, observations, memory):
        seen.extend(o.t for o in observations)
        return act(self, observations, memory)

    return noted


def test_a_named_session_outlives_its_connection(served):
    _, url = served
    first = client(url)
    first.infer(observed(0.0, 1.0, session_id="left arm"))
    first._ws.close()
    _until(lambda: client(url).infer(observed(0.0, session_id="left arm"))["actions"][0, 0] == 1.0)


def test_two_connections_cannot_have_one_session(served):
    _, url = served
    first, second = client(url), client(url)
    first.infer(observed(0.0, 1.0, session_id="twin"))
    with pytest.raises(RuntimeError, match="'twin' is in use by another connection"):
        second.infer(observed(0.0, session_id="twin"))
    assert second.infer(observed(0.0, 0.5, session_id="other"))["actions"][0, 0] == 0.5
    assert first.infer(observed(0.0, session_id="twin"))["actions"][0, 0] == 1.0, "nothing happened to it"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"prompt": "go"}, r"lacks observation/state; it has \['prompt'\]"),
        ([1, 2], "send a map"),
        (observed(0.0) | {"observation/state": np.zeros(3, np.float32)}, r"float32 \[3\]; send float32 \[2\]"),
        (observed(np.nan), "finite"),
        (observed(0.0) | {"prompt": 3}, "prompt is a int; send the task in words"),
        (observed(0.0, t=-1), "t is -1"),
        (observed(0.0, reset="yes"), "reset is 'yes'"),
        (observed(0.0, session_id=""), "session_id is ''"),
    ],
)
def test_a_bad_observation_is_told_and_costs_nothing(served, message, reason):
    robot = client(served[1])
    robot.infer(observed(0.0, 1.0))
    with pytest.raises(RuntimeError, match=reason):
        robot.infer(message)
    assert robot.infer(observed(0.0))["actions"][0, 0] == 1.0, "the episode goes on"


def test_a_bad_observation_with_a_reset_ends_no_episode(served):
    robot = client(served[1])
    robot.infer(observed(0.0, 1.0))
    with pytest.raises(RuntimeError, match="lacks"):
        robot.infer({"reset": True})
    assert robot.infer(observed(0.0))["actions"][0, 0] == 1.0


def test_a_policy_that_fails_is_told_and_answers_others(served, monkeypatch):
    robot, other = client(served[1]), client(served[1])
    robot.infer(observed(0.0, 1.0))
    with monkeypatch.context() as broken:
        broken.setattr(PointPolicy, "act", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match=r"the policy failed .ZeroDivisionError"):
            robot.infer(observed(0.0))
    assert other.infer(observed(0.0, 0.5))["actions"][0, 0] == 0.5
    assert robot.infer(observed(0.0))["actions"][0, 0] == 1.0, "no memory has changed"


def _nan_once(act):
    """The policy whose rows with a state below -1 are not finite, memory included."""

    def broken(self, observations, memory):
        actions, memory = act(self, observations, memory)
        bad = np.array([o.proprio[0] < -1 for o in observations])
        actions = actions.copy()
        actions[bad] = np.nan
        memory["cue"][bad] = np.nan
        return actions, memory

    return broken


def test_actions_that_are_not_finite_stay_in_the_house(served, monkeypatch):
    robot, other = client(served[1]), client(served[1])
    robot.infer(observed(0.0, 1.0))
    monkeypatch.setattr(PointPolicy, "act", _nan_once(PointPolicy.act))
    for more in ({}, {"reset": True}):
        with pytest.raises(RuntimeError, match="not finite"):
            robot.infer(observed(-2.0, **more))
    assert other.infer(observed(0.0, 0.5))["actions"][0, 0] == 0.5
    answer = robot.infer(observed(0.0))
    assert (answer["actions"][0, 0], answer["policy_step"]) == (1.0, 1), "its memory is as before"


def test_limits_hold_in_every_answer():
    limits = Limits(low=(-0.5,), high=(0.6,), change=(0.25,))
    with serving(limits=limits) as (_, url):
        robot = client(url)
        assert robot.infer(observed(0.0, 1.0))["actions"].ravel().tolist() == pytest.approx([0.6, 0.6])
        sent = [robot.infer(observed(0.0, -3.0 if step == 0 else 0.0))["actions"].ravel() for step in range(3)]
        assert np.concatenate(sent).tolist() == pytest.approx([0.35, 0.1, -0.15, -0.4, -0.5, -0.5])
        assert robot.infer(observed(0.0, 0.6, reset=True))["actions"][0, 0] == pytest.approx(0.6)


def test_limits_begin_at_the_action_that_was_played():
    with serving(limits=Limits(change=(0.25,))) as (_, url):
        robot = client(url)
        robot.infer(observed(0.0, 0.0))
        assert robot.infer(observed(0.0, 1.0))["actions"].ravel().tolist() == [0.25, 0.5]
        assert robot.infer(observed(0.0, 0.0, t=3))["actions"].ravel().tolist() == [0.5, 0.75], "one of two played"


def test_a_heavy_message_delays_nobody_else(served):
    robot, hostile = client(served[1]), client(served[1])
    robot.infer(observed(0.0, 1.0))
    ended = threading.Event()

    def attack():
        for value in ([["ab"] * 200] * 20_000, {"prompt": "red " * 3_900_000}, {"x": [2**31] * 2_000_000}):
            hostile._ws.send(msgpack.packb(value))
            assert isinstance(hostile._ws.recv(), str)
        ended.set()

    thread = threading.Thread(target=attack)
    thread.start()
    slowest = 0.0
    while not ended.is_set():
        began = time.perf_counter()
        robot.infer(observed(0.0))
        slowest = max(slowest, time.perf_counter() - began)
    thread.join()
    assert slowest < 1.0, "on a machine that others use too; benchmarks.reliability has the measured figures"


def test_text_and_nonsense_are_refused(served):
    robot = client(served[1])
    for nonsense in ("hello", b"\xc1\xc1"):
        robot._ws.send(nonsense)
        assert "message" in robot._ws.recv()


def test_too_large_a_message_ends_its_connection_only():
    with serving(ServerConfig(port=0, max_message_mib=0.01)) as (_, url):
        large, other = client(url), client(url)
        with pytest.raises(ConnectionClosedError, match="1009"):
            large.infer(observed(0.0, image=np.zeros(20_000, np.uint8)))
        assert other.infer(observed(0.0, 1.0))["actions"][0, 0] == 1.0


def test_the_log_says_who_ended_a_connection(served, caplog):
    def said(text):
        return any(text in record.getMessage() for record in caplog.records)

    with caplog.at_level(logging.INFO, logger="ipvla"):
        gone = client(served[1])
        gone.infer(observed(0.0))
        gone._ws.socket.shutdown(socket.SHUT_RDWR)
        _until(lambda: said("client left"))
        assert not said("close frame")
        with serving(ServerConfig(port=0, max_message_mib=0.01)) as (_, url), pytest.raises(ConnectionClosedError):
            client(url).infer(observed(0.0, image=np.zeros(20_000, np.uint8)))
        _until(lambda: said("1009"))


def test_only_so_many_are_let_in():
    with serving(ServerConfig(port=0, max_sessions=2)) as (_, url):
        first, second = client(url), client(url)
        with pytest.raises(InvalidStatus, match="503"):
            client(url)
        for robot in (first, second):
            assert robot.infer(observed(0.0, 1.0))["actions"][0, 0] == 1.0


def named(robot, name, cue=0.0):
    return robot.infer(observed(0.0, cue, session_id=name))


def test_a_new_name_per_episode_is_served_for_ever_and_harms_nobody():
    with serving(ServerConfig(port=0, max_sessions=16)) as (server, url):
        honest, arm, busy = client(url), client(url), client(url)
        honest.infer(observed(0.0, 0.5))
        named(arm, "arm", -0.5)
        arm._ws.close()
        _until(lambda: server.status()["connections"] == 2)
        for episode in range(100):
            assert named(busy, f"episode {episode}", 1.0)["actions"][0, 0] == 1.0
        assert server.status()["sessions"] <= 2 + 8
        assert honest.infer(observed(0.0))["actions"][0, 0] == 0.5
        assert named(client(url), "arm")["actions"][0, 0] == -0.5, "one connection has taken its own room only"


def test_where_many_were_left_the_oldest_makes_room():
    with serving(ServerConfig(port=0, max_sessions=4)) as (server, url):
        for index in range(6):
            robot = client(url)
            named(robot, f"left {index}", 1.0)
            robot._ws.close()
            _until(lambda: server.status()["connections"] == 0)
        assert server.status()["sessions"] == 4
        robot = client(url)
        assert named(robot, "left 5")["policy_step"] == 1
        assert named(client(url), "left 0")["policy_step"] == 0, "forgotten"


def test_a_silent_connection_keeps_its_memory_and_a_lease_ends_with_its_time():
    with serving(ServerConfig(port=0, lease_s=0.2)) as (server, url):
        silent, left = client(url), client(url)
        silent.infer(observed(0.0, 1.0))
        named(left, "left", 1.0)
        left._ws.close()
        _until(lambda: server.status()["connections"] == 1)
        time.sleep(0.3)
        other = client(url)
        assert named(other, "left")["policy_step"] == 0
        assert silent.infer(observed(0.0))["actions"][0, 0] == 1.0


def test_arms_that_share_a_connection_have_a_memory_each(served):
    robot = client(served[1])
    for cue in (-1.0, 1.0):
        named(robot, f"arm {cue}", cue)
    for cue in (-1.0, 1.0, -1.0):
        assert named(robot, f"arm {cue}")["actions"][0, 0] == cue


def test_the_last_control_step_that_can_be_sent(served):
    robot = client(served[1])
    robot.infer(observed(0.0, 1.0, t=2**31 - 1))
    assert robot.infer(observed(0.0))["actions"][0, 0] == 1.0


def test_who_has_no_token_stays_outside():
    with pytest.raises(ValueError, match="set IPVLA_SERVE_TOKEN"), serving(ServerConfig("0.0.0.0", 0)):
        pass  # pragma: no cover
    with serving(token="secret") as (_, url):
        for key in (None, "guess"):
            with pytest.raises(InvalidStatus, match="401"):
                client(url, key)
        assert client(url, "secret").infer(observed(0.0, 1.0))["actions"][0, 0] == 1.0
        assert _health(url)["status"] == "ok", "a load balancer has no token"


def test_health_counts(served):
    before = _health(served[1])
    robot = client(served[1])
    robot.infer(observed(0.0))
    with pytest.raises(RuntimeError):
        robot.infer({})
    after = _health(served[1])
    assert after["requests"] - before["requests"] == 2
    assert after["refused"] - before["refused"] == 1
    assert after["sessions"] >= 1


def test_those_who_wait_are_answered_together(served):
    robots = [client(served[1]) for _ in range(6)]
    wrong = []

    def play(index, robot):
        cue = index - 2.5
        actions = [robot.infer(observed(0.0, cue if step == 0 else 0.0))["actions"][0, 0] for step in range(20)]
        wrong.extend(action for action in actions if action != cue)

    threads = [threading.Thread(target=play, args=pair) for pair in enumerate(robots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"port": 70_000}, "port is 70000"), ({"max_sessions": 0}, "max_sessions"), ({"lease_s": -1}, "lease_s")],
)
def test_limits_that_cannot_be(values, reason):
    with pytest.raises(ValueError, match=reason):
        ServerConfig(**values)


def test_a_port_that_is_taken(served):
    port = int(served[1].rpartition(":")[2])
    with pytest.raises(ValueError, match="cannot listen"), serving(ServerConfig(port=port)):
        pass  # pragma: no cover


def _health(url):
    with urllib.request.urlopen(url.replace("ws://", "http://") + "/healthz", timeout=10) as answer:
        return json.loads(answer.read())


def _until(done):
    deadline = time.monotonic() + 10
    while True:
        try:
            if done():
                return
        except RuntimeError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)
