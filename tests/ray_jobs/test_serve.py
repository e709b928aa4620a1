"""The job that robots talk to, as a process, with a real policy."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.rollout_speed import save_untrained_policy
from ipvla.contract import Contract, Limits, Pictures
from ipvla.data.conventions import Conventions
from ipvla.data.statistics import Statistics
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import CheckpointError, Policy, state
from ipvla.rollout.openpi.messages import pack, unpack
from ipvla.rollout.openpi.server import ServerConfig
from ipvla.storage import SOURCE_TREE
from ipvla.types import Observation
from ray_jobs.serve import ServeConfig, metadata, serving

openpi = pytest.importorskip("openpi_client.websocket_client_policy")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    save_untrained_policy(root / "runs" / "recall" / "gru" / "policy")
    return root


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    """Of a server in a process of its own, which ends well when it is told to."""
    command = ["ray_jobs.serve", "--storage_root", str(root), "--name", "gru", "--server.port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", *command], cwd=SOURCE_TREE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        found = re.search(r"ws://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def message(rng: np.random.Generator, **more: object) -> dict[str, object]:
    pictures = rng.integers(0, 255, (2, 80, 64, 3), dtype=np.uint8)
    state = rng.normal(size=8).astype(np.float32)
    images = {"observation/image": pictures[0], "observation/wrist_image": pictures[1]}
    return {**images, "observation/state": state, "prompt": "put the bowl on the plate", **more}


@pytest.mark.slow
def test_answers_are_those_of_the_policy_itself(root: Path, url: str) -> None:
    policy = Policy.load(root / "runs" / "recall" / "gru" / "policy")
    robot, memory = openpi.WebsocketClientPolicy(url), policy.initial_memory(1)
    rng = np.random.default_rng(0)
    for step in range(4):
        sent = message(rng)
        images = {"agentview": sent["observation/image"], "robot0_eye_in_hand": sent["observation/wrist_image"]}
        observation = Observation(images, sent["observation/state"], sent["prompt"], step * policy.execute)  # type: ignore[arg-type]
        chunks, memory = policy.act([observation], memory)
        np.testing.assert_allclose(robot.infer(sent)["actions"], chunks[0], atol=1e-6)


@pytest.mark.slow
def test_who_connects_is_told_what_to_send(url: str) -> None:
    told = openpi.WebsocketClientPolicy(url).get_server_metadata()
    assert told["actions"] == {"dtype": "float32", "shape": [8, 7], "range": [-1, 1]}
    assert told["observation"]["observation/state"] == {"dtype": "float32", "shape": [8]}
    assert told["observation"]["observation/wrist_image"]["camera"] == "robot0_eye_in_hand"
    assert len(told["policy_sha256"]) == 64
    assert told["memory"] == "gru"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            {"observation/image": np.zeros((64, 64), np.uint8)},
            r"observation/image is uint8 \[64, 64\]; send uint8",
        ),
        ({"observation/image": np.zeros((64, 64, 3), np.float32)}, r"send uint8 \[H, W, 3\] in 0..255"),
        ({"observation/state": np.zeros(7, np.float32)}, r"send float32 \[8\]"),
        ({"prompt": "put " * 100}, "shorten the instruction"),
        ({"prompt": "put " * 1_000_000}, "4000000 exceeds max_str_len"),
        ({"observation/image": np.zeros((1, 5_500_000, 3), np.uint8)}, "at most 4096 pixels a side"),
    ],
)
def test_what_the_policy_cannot_use_is_told(url: str, wrong: dict[str, object], reason: str) -> None:
    robot = openpi.WebsocketClientPolicy(url)
    with pytest.raises(RuntimeError, match=reason):
        robot.infer(message(np.random.default_rng(0), **wrong))
    assert robot.infer(message(np.random.default_rng(0)))["policy_step"] == 0


def test_a_client_is_told_the_terms_of_the_policy(root: Path) -> None:
    policy = Policy.load(root / "runs" / "recall" / "gru" / "policy")
    told = metadata(policy, policy.contract, "abc")
    assert Contract.from_dict(unpack(pack(told))["contract"]) == policy.contract
    assert told["observation"]["observation/image"]["about"] == "RGB, upright"
    mirrored = replace(policy.transforms.contract, pictures=Pictures("mirrored"))
    turned = replace(
        policy,
        transforms=replace(
            policy.transforms, conventions=replace(policy.transforms.conventions, recorded=mirrored)
        ),
    )
    assert (
        "left and right exchanged"
        in metadata(turned, turned.contract, "abc")["observation"]["observation/image"]["about"]
    )


def test_the_range_of_joints_is_that_of_their_data(tmp_path: Path) -> None:
    joints = np.random.default_rng(0).uniform(-2, 2, (50, 14)).astype(np.float32)
    conventions = Conventions(
        Statistics.compute([joints], [joints], (True,) * 14),
        cameras=("front",),
        image_size=32,
        chunk=4,
        gripper="none",
    )
    policy = Policy.build(IPVLAConfig(backbone=TinyConfig(), chunk=4), conventions, 4)
    actions = metadata(policy, policy.contract, "abc")["actions"]
    assert "range" not in actions
    assert actions["shape"] == [4, 14]
    np.testing.assert_allclose(actions["max"], joints.max(0))
    np.testing.assert_allclose(actions["q01"], conventions.statistics.action.q01)


def test_a_policy_that_is_not_there(root: Path) -> None:
    with pytest.raises(CheckpointError, match="no policy in"):
        serving(ServeConfig(storage_root=root, name="lstm"), None)


@pytest.mark.parametrize(
    ("value", "reason"), [(torch.nan, r"head\..* is not finite"), (1e38, "first actions are not finite")]
)
def test_a_policy_that_is_not_finite_is_not_served(root: Path, tmp_path: Path, value: float, reason: str) -> None:
    policy = Policy.load(root / "runs" / "recall" / "gru" / "policy")
    weights = state(policy.model)
    broken = {name: torch.full_like(weight, value) for name, weight in weights.items() if name.startswith("head.")}
    policy.save(tmp_path / "policy", {**weights, **broken})
    with pytest.raises(CheckpointError, match=reason):
        serving(ServeConfig(storage_root=root, policy=tmp_path / "policy"), None)


def test_a_robots_limits_are_part_of_the_contract(root: Path) -> None:
    limits = Limits(high=(0.5,) * 7)
    server = serving(ServeConfig(storage_root=root, name="gru", limits=limits), None)
    assert Contract.from_dict(unpack(server.greeting)["contract"]).limits == limits
    with pytest.raises(ValueError, match=r"limits.high has 2 numbers; actions have 7"):
        serving(ServeConfig(storage_root=root, name="gru", limits=Limits(high=(1.0, 1.0))), None)


def test_nobody_else_is_let_in_without_a_token(root: Path) -> None:
    with pytest.raises(ValueError, match="IPVLA_SERVE_TOKEN"):
        serving(ServeConfig(storage_root=root, name="gru", server=ServerConfig(host="0.0.0.0")), None)


def test_one_policy_is_named(tmp_path: Path) -> None:
    for settings in ({}, {"policy": tmp_path, "name": "gru"}):
        with pytest.raises(ValueError, match="one of them"):
            ServeConfig(**settings)  # type: ignore[arg-type]
