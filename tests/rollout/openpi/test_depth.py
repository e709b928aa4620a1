"""Depth in messages: what is sent is what arrives, and what no camera has is refused in a line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.geometry import CameraGeometry, pinhole
from ipvla.rollout.openpi.depth import geometry_keys
from ipvla.rollout.openpi.messages import ObservationError, from_message, pack, to_message, unpack
from ipvla.types import Observation

CAMERAS = ("agentview", "robot0_eye_in_hand")


def observation(seed: int, height: int = 4, width: int = 6) -> Observation:
    rng = np.random.default_rng(seed)
    pose = np.eye(4)
    pose[:3, 3] = rng.normal(size=3)
    depth = rng.uniform(0, 2, (height, width)).astype(np.float32)
    seen = CameraGeometry(depth, pinhole(50, height, width), pose, "mirrored")
    picture = rng.integers(0, 255, (height, width, 3)).astype(np.uint8)
    state = np.zeros(8, np.float32)
    return Observation(dict.fromkeys(CAMERAS, picture), state, "press", 3, geometry=dict.fromkeys(CAMERAS, seen))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_points_arrive_as_they_were_sent(seed: int, height: int, width: int) -> None:
    sent = observation(seed, height, width)
    message = unpack(pack(to_message(sent)))
    found = from_message(message, CAMERAS, 8, 0, geometry="mirrored")
    assert sent.geometry is not None
    assert found.geometry is not None
    for camera in CAMERAS:
        np.testing.assert_allclose(
            found.geometry[camera].points(), sent.geometry[camera].points(), atol=1e-5, equal_nan=True
        )
    assert from_message(message, CAMERAS, 8, 0).geometry is None, "of a policy that reads none"


def test_pictures_alone_are_sent_as_before() -> None:
    plain = to_message(Observation({"agentview": np.zeros((2, 2, 3), np.uint8)}, np.zeros(8, np.float32), "go", 0))
    assert set(plain) == {"observation/image", "observation/state", "prompt", "t"}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("depth", None, "lacks observation/image_depth"),
        ("depth", "far", r"observation/image_depth is no array \[H, W\]"),
        ("depth", np.zeros((2, 2, 1), np.float32), r"is no array \[H, W\]"),
        ("depth", np.full((2, 2), np.nan, np.float32), "send 0 where depth is unknown"),
        ("depth", np.full((2, 2), -1, np.float32), "are negative"),
        ("depth", np.zeros((0, 2), np.float32), "send 1 to 4096 pixels"),
        ("intrinsics", np.zeros((3, 3), np.float32), "focal lengths"),
        ("intrinsics", np.eye(4, dtype=np.float32), r"_intrinsics is no array \[3, 3\]"),
        ("pose", np.eye(3, dtype=np.float32), r"_pose is no array \[4, 4\]"),
        ("pose", np.full((4, 4), np.inf, np.float32), "no finite numbers"),
    ],
)
def test_what_no_camera_has_is_refused(name: str, value: object, told: str) -> None:
    message = {**to_message(observation(0)), f"observation/image_{name}": value}
    if value is None:
        del message[f"observation/image_{name}"]
    with pytest.raises(ObservationError, match=told):
        from_message(message, CAMERAS, 8, 0, geometry="upright")


def test_the_server_says_what_to_send() -> None:
    told = geometry_keys("observation/wrist_image")
    sent = to_message(observation(0))
    for key, each in told.items():
        assert sent[key].dtype == each["dtype"]
