"""The engineer's hour: docs/your_robot.md from data of two arms to a control loop with openpi's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ipvla.data.lerobot import Layout
from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.source import Feature, Trajectory
from ipvla.storage import SOURCE_TREE
from tests.data.lerobot.writing import write_lerobot
from tests.journeys.page import Shell, address, commands, python_code, section

websocket = pytest.importorskip("openpi_client.websocket_client_policy")
PAGE = SOURCE_TREE / "docs" / "your_robot.md"
CAMERAS, HZ, JOINTS = ("high", "left_wrist", "right_wrist"), 50, 14
SMALL = {
    "train": [
        *("--data.image_size", "32", "--training.steps", "60", "--training.log_every", "10", "--lanes.lanes", "2"),
        *("--lanes.window", "2", "--optimizer.warmup_steps", "5", "--optimizer.lr", "2e-3"),
    ],
    "serve": ["--use_gpu", "false", "--server.port", "0"],
}


def joints(t: npt.NDArray[np.float64], phase: float) -> npt.NDArray[np.float32]:
    """Smooth motions of 14 joints at control steps [T], within the page's limits; [T, 14]."""
    turn = 2 * np.pi * t[:, None] / 150 + phase + np.arange(JOINTS) / 4
    return (0.5 + 0.4 * np.sin(turn)).astype(np.float32)


def picture(camera: int, state: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """A grey level for each third of the joints, whatever the camera."""
    level = (255 * state[camera::3].mean()).clip(0, 255)
    return np.full((24, 32, 3), level, np.uint8)


def demonstration(seed: int) -> Trajectory:
    length = 150
    states = joints(np.arange(length + 1.0), seed)
    images = {
        f"observation.images.{name}": EncodedPictures(tuple(encode_png(picture(i, row)) for row in states[:-1]))
        for i, name in enumerate(CAMERAS)
    }
    steps = {
        **images,
        "observation.state": states[:-1],
        "action": states[1:],
        "task": ("fold the towel",) * length,
    }
    return Trajectory(steps, f"episode {seed}", {})


@pytest.fixture
def arms(tmp_path: Path) -> Path:
    features = {f"observation.images.{name}": Feature("image", (24, 32, 3), "uint8") for name in CAMERAS}
    numbers = {name: Feature("number", (JOINTS,), "float32") for name in ("observation.state", "action")}
    return write_lerobot(
        tmp_path / "arms", Layout(HZ, features | numbers, None, "arms"), map(demonstration, range(3))
    )


class MovedError(Exception):
    """The robot has moved for long enough."""


class Robot:
    """What the page leaves to the reader: cameras, joints, and a place to send actions to."""

    def __init__(self, steps: int) -> None:
        self.sent: list[npt.NDArray[np.float32]] = []
        self._steps, self._now = steps, joints(np.zeros(1), 0.0)[0]

    def cameras(self) -> dict[str, npt.NDArray[np.uint8]]:
        return {name: picture(i, self._now) for i, name in enumerate(CAMERAS)}

    def joints(self) -> npt.NDArray[np.float32]:
        return self._now

    def send(self, action: npt.NDArray[np.float32]) -> None:
        self._now = np.array(action)
        self.sent.append(self._now)
        if len(self.sent) == self._steps:
            raise MovedError


@pytest.mark.long
@pytest.mark.timeout(600)
def test_from_a_data_set_to_a_control_loop(tmp_path: Path, arms: Path) -> None:
    lines = commands(PAGE.read_text().partition("## ")[0])
    shell = Shell(tmp_path / "home", SMALL, places={"/data/arms": arms})
    *before, serve = lines
    assert [line.split()[1] for line in lines] == ["data", "statistics", "train", "open_loop", "serve"]

    shown = shell.run(before, 500)
    assert "correlation" in shown
    assert "do not let a robot move" not in shown, "the toy's motion is easy to learn"

    with shell.running(serve) as process:
        host, port = address(process)
        robot = Robot(steps=60)
        loop = python_code(section(PAGE, "The loop at the robot")).replace('"gpu-box", 8000', f'"{host}", {port}')
        with pytest.raises(MovedError):
            exec(loop, {"cameras": robot.cameras, "joints": robot.joints, "send": robot.send})
        sent = np.stack(robot.sent)
        assert sent.shape == (60, JOINTS)
        low, high, change = limits(serve)
        assert ((low <= sent) & (sent <= high)).all()
        assert (np.abs(np.diff(sent, axis=0)) <= change + 1e-6).all(), "the page's limits hold from chunk to chunk"
        assert np.abs(sent[-1] - sent[0]).max() > 0.1, "it moves"
        answer = websocket.WebsocketClientPolicy(host, port).infer(aloha(robot))
        assert answer["actions"].shape == (25, JOINTS)


def limits(serve: str) -> Iterator[npt.NDArray[np.float64]]:
    """What follows `--limits.low`, `.high` and `.change` on the command line, [14] each."""
    for name in ("low", "high", "change"):
        found = re.search(rf'--limits\.{name} "\[([^]]*)\]"', serve)
        assert found is not None
        yield np.array([float(number) for number in found[1].split(",")])


def aloha(robot: Robot) -> dict[str, Any]:
    """An observation as openpi's ALOHA clients send it."""
    pictures = {name: image.transpose(2, 0, 1) for name, image in robot.cameras().items()}
    return {"images": pictures, "state": robot.joints().astype(np.float64), "prompt": "fold the towel"}
