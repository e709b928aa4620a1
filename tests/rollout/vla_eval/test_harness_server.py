"""A policy as a model server of vla-evaluation-harness: its client's messages, and what comes back."""

from __future__ import annotations

import asyncio
import io
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from benchmarks.rollout_speed import save_untrained_policy
from ipvla.policy import Policy
from ipvla.rollout.openpi.messages import MessageError
from ipvla.rollout.openpi.server import ServerConfig, serve_until
from ipvla.rollout.vla_eval.messages import Message
from ipvla.rollout.vla_eval.server import HarnessServer
from ipvla.types import Observation
from ray_jobs.serve import ServeConfig, serving

TASK = "put the bowl on the plate"


def encoded(value: Any) -> dict[str, Any]:
    """As the harness's codec has pictures (PNG by default) and other arrays."""
    if value.ndim == 3:
        file = io.BytesIO()
        Image.fromarray(value).save(file, format="PNG")
        return {"__image__": True, "format": "png", "data": file.getvalue(), "shape": list(value.shape)}
    return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}


def packed(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    values = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    data: bytes = msgpack.packb(values, default=encoded, use_bin_type=True)
    return data


class HarnessClient:
    """What the harness's client sends: hello first, then messages of an episode, one observation per action."""

    def __init__(self, url: str) -> None:
        self.connection: ClientConnection = connect(url, compression=None, max_size=None, ping_interval=None)
        self.seq = 0
        self.hello = self.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1})

    def send(self, kind: str, payload: dict[str, Any]) -> None:
        self.seq += 1
        self.connection.send(packed(kind, payload, self.seq))

    def ask(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        self.send(kind, payload)
        answer = msgpack.unpackb(self.connection.recv(timeout=60), raw=False)
        assert answer.keys() == {"type", "payload", "seq", "timestamp"}
        assert answer["seq"] == self.seq
        return answer

    def act(self, payload: dict[str, Any]) -> np.ndarray:
        answer = self.ask("observation", payload)
        assert answer["type"] == "action", answer
        action = answer["payload"]["actions"]
        assert action["__ndarray__"]
        return np.frombuffer(action["data"], action["dtype"]).reshape(action["shape"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "policy"
    save_untrained_policy(directory)
    return directory


@pytest.fixture(scope="module")
def policy(directory: Path) -> Policy:
    return Policy.load(directory)


@pytest.fixture(scope="module")
def url(directory: Path) -> Iterator[str]:
    """Of a server in a thread of this process."""
    loop, stop, started, port = asyncio.new_event_loop(), asyncio.Event(), threading.Event(), list[int]()
    config = ServeConfig(policy=directory, protocol="vla_eval", server=ServerConfig(port=0))

    def told(number: int) -> None:
        port.append(number)
        started.set()

    server = serving(config, None)
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve_until(stop, server, told)))
    thread.start()
    assert started.wait(60)
    yield f"ws://127.0.0.1:{port[0]}"
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


def observations(seed: int, count: int) -> list[dict[str, Any]]:
    """As its LIBERO benchmark sends them, with the state and the second picture."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (count, 2, 64, 64, 3), dtype=np.uint8)
    states = rng.normal(size=(count, 8)).astype(np.float32)
    return [
        {
            "images": {"agentview": pictures[t, 0], "wrist": pictures[t, 1]},
            "task_description": TASK,
            "states": states[t],
            "controller_states": states[t],
        }
        for t in range(count)
    ]


def expected(policy: Policy, sent: list[dict[str, Any]]) -> np.ndarray:
    """The policy's own actions [T, A] of an episode in which each is played, asked every `execute` steps."""
    memory, actions = policy.initial_memory(1), list[np.ndarray]()
    for t in range(0, len(sent), policy.execute):
        one = sent[t]
        images = {"agentview": one["images"]["agentview"], "robot0_eye_in_hand": one["images"]["wrist"]}
        chunks, memory = policy.act([Observation(images, one["states"], TASK, t)], memory)
        actions.extend(chunks[0][: policy.execute])
    return np.array(actions[: len(sent)])


def test_an_episode_has_the_policys_actions_and_its_memory(policy: Policy, url: str) -> None:
    client, sent = HarnessClient(url), observations(0, 2 * policy.execute + 1)
    for _ in range(2):  # the second episode begins with an empty memory
        client.send("episode_start", {"task": {"name": TASK, "suite": "libero_spatial"}})
        played = np.array([client.act(one) for one in sent])
        np.testing.assert_allclose(played, expected(policy, sent), atol=1e-5)
        assert played.dtype == np.float32
        client.send("episode_end", {"metrics": {"success": True}, "steps": len(sent), "elapsed_sec": 1.0})


def test_an_episode_that_ends_early_leaves_no_action_behind(policy: Policy, url: str) -> None:
    client, sent = HarnessClient(url), observations(1, 3)
    client.send("episode_start", {"task": {}})
    client.act(observations(2, 1)[0])
    client.send("episode_start", {"task": {}})
    np.testing.assert_allclose([client.act(one) for one in sent], expected(policy, sent), atol=1e-5)


def test_hello_tells_what_the_policy_reads_and_gives(url: str) -> None:
    told = HarnessClient(url).hello
    assert told["type"] == "hello"
    payload = told["payload"]
    assert payload["protocol_version"] == 1
    assert payload["observation_params"] == {"send_wrist_image": True, "send_state": True}
    assert payload["action_spec"]["gripper"]["format"] == "binary_close_positive"
    assert payload["observation_spec"].keys() == {"agentview", "wrist", "language", "state"}


@pytest.mark.parametrize(
    ("kind", "payload", "told"),
    [
        ("observation", {"images": {}, "states": np.zeros(8), "task_description": TASK}, "lacks agentview, wrist"),
        ("observation", observations(0, 1)[0] | {"states": None}, "lacks states, which the policy reads"),
        ("observation", observations(0, 1)[0] | {"states": np.zeros(7)}, r"send float32 \[8\]"),
        ("hello", {"protocol_version": 2}, "protocol_version is 2; this server speaks 1"),
        ("jump", {}, "type is 'jump'; send one of hello"),
    ],
)
def test_what_is_wrong_is_answered_and_the_connection_stays(
    url: str, kind: str, payload: dict[str, Any], told: str
) -> None:

    client = HarnessClient(url)
    client.send("episode_start", {"task": {}})
    client.send(kind, payload)
    answer = msgpack.unpackb(client.connection.recv(timeout=60), raw=False)
    assert answer["type"] == "error"
    assert re.search(told, answer["payload"]["error"]), answer["payload"]["error"]
    assert client.act(observations(0, 1)[0]).shape == (7,)


def test_an_observation_of_no_episode_is_refused(url: str) -> None:
    """The harness connects again by itself, and goes on without saying that the episode is another one here."""
    answer = HarnessClient(url).ask("observation", observations(0, 1)[0])
    assert answer["type"] == "error"
    assert "send episode_start first" in answer["payload"]["error"]


def test_it_says_when_it_is_ready(url: str) -> None:
    with urllib.request.urlopen(f"http{url.removeprefix('ws')}/health") as answer:
        assert b'"status": "ok"' in answer.read()


def test_it_listens_to_this_machine_alone(directory: Path) -> None:
    config = ServeConfig(policy=directory, protocol="vla_eval", server=ServerConfig(host="0.0.0.0"))
    with pytest.raises(ValueError, match="sends no token; set it to 127"):
        serving(config, "a token")
    with pytest.raises(ValueError, match="protocol is 'grpc'; choose one of openpi, vla_eval"):
        ServeConfig(policy=directory, protocol="grpc")


def test_a_policy_that_reads_depth_is_refused_at_the_start(policy: Policy) -> None:
    deep = replace(policy.contract, geometry=True)
    with pytest.raises(ValueError, match=r"reads depth .* which vla-evaluation-harness does not send"):
        HarnessServer(ServerConfig(), pytest.fail, pytest.fail, {}, deep)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"__image__": True, "format": "gif", "data": b"GIF89a", "shape": [1, 1, 3]}, "picture of format 'gif'"),
        ({"__image__": True, "format": "png", "data": b"no", "shape": [1, 1, 3]}, "no whole png picture"),
        ({"__ndarray__": True, "data": b"12", "dtype": "|O", "shape": [1]}, "send numbers"),
        ({"__ndarray__": True, "data": b"12", "dtype": "<f4", "shape": [9]}, "cannot be made of 2 bytes"),
    ],
)
def test_claims_are_checked_before_bytes_are_read(value: dict[str, Any], told: str) -> None:
    raw = {"type": "observation", "payload": {"images": value}, "seq": 1, "timestamp": 0.0}
    with pytest.raises(MessageError, match=told):
        Message.unpack(msgpack.packb(raw))


def test_a_picture_that_unfolds_to_gigabytes_is_refused_unread() -> None:
    file = io.BytesIO()
    Image.new("L", (5000, 1)).save(file, format="PNG")
    picture = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": [1, 5000, 1]}
    raw = {"type": "observation", "payload": {"images": picture}, "seq": 1, "timestamp": 0.0}
    with pytest.raises(MessageError, match="a picture of 5000 x 1 L; send RGB of at most 4096"):
        Message.unpack(msgpack.packb(raw))


def test_their_own_client_plays_an_episode(policy: Policy, url: str) -> None:
    """Version 0.8.0 of package vla-eval; run with it on PYTHONPATH."""
    connection = pytest.importorskip("vla_eval.connection", reason="pip install vla-eval in a place of its own")
    sent = observations(3, policy.execute + 2)

    async def play() -> tuple[dict[str, Any], list[np.ndarray]]:
        client = connection.Connection(url)
        await client.connect(benchmark="libero")
        await client.start_episode({"task": {"name": TASK}})
        actions = [(await client.act(one))["actions"] for one in sent]
        await client.end_episode({"metrics": {"success": False}})
        await client.close()
        return client.server_info, actions

    info, actions = asyncio.run(play())
    specs = pytest.importorskip("vla_eval.specs")
    assert specs.DimSpec.from_dict(info["action_spec"]["gripper"]) == specs.GRIPPER_CLOSE_POS
    assert specs.DimSpec.from_dict(info["observation_spec"]["state"]) == specs.STATE_EEF_POS_AA_GRIP
    np.testing.assert_allclose(actions, expected(policy, sent), atol=1e-5)
