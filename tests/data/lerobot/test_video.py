"""A frame of a video is found by its time, from wherever decoding stands."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.data.lerobot.encoder import VideoEncoder, VideoSettings
from ipvla.data.lerobot.video import VideoFile
from ipvla.data.source import DatasetError

FPS, FRAMES = 10, 40
TOLERANCE_S = 0.25 / FPS


def level(t: int) -> int:
    return 6 * t


def write(path: Path, configuration: VideoSettings) -> Path:
    video = VideoEncoder(path, FPS, (64, 64, 3), configuration)
    for t in range(FRAMES):
        video.add(np.full((64, 64, 3), level(t), np.uint8))
    video.close()
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """With few and many frames between key frames, the second with frames out of order, and of another codec."""
    root = tmp_path_factory.mktemp("videos")
    all_settings = (VideoSettings(), VideoSettings(key_frame_every=15), VideoSettings("libsvtav1", 30))
    return [write(root / f"{i}.mp4", each) for i, each in enumerate(all_settings)]


@settings(deadline=None, max_examples=30)
@given(steps=st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=12), which=st.integers(0, 2))
def test_every_order_of_frames_gives_the_same_frames(videos, steps, which):
    video = VideoFile(str(videos[which]))
    for t in steps:
        assert abs(int(video.frame(t / FPS, TOLERANCE_S).mean()) - level(t)) <= 2


def test_encoding_leaves_the_process_with_the_priority_that_it_had(tmp_path):
    before = os.sched_getscheduler(0)
    write(tmp_path / "av1.mp4", VideoSettings("libsvtav1", 30))
    assert os.sched_getscheduler(0) == before


def test_going_forward_decodes_each_frame_once_and_going_back_starts_at_a_key_frame(videos):
    for path in videos:
        video = VideoFile(str(path))
        video.frame(0, TOLERANCE_S)
        decoding = video._decoded
        for t in range(1, 35):
            video.frame(t / FPS, TOLERANCE_S)
        assert video._decoded is decoding
        video.frame(33 / FPS, TOLERANCE_S)
        assert video._decoded is not decoding


def test_a_far_frame_is_decoded_from_its_key_frame(videos):
    video = VideoFile(str(videos[1]))
    video.frame(0, TOLERANCE_S)
    decoding = video._decoded
    video.frame(38 / FPS, TOLERANCE_S)
    assert video._decoded is not decoding


@pytest.mark.parametrize(
    ("seconds", "message"), [(FRAMES / FPS, "the video ends before"), (0.05, r"the next one is at 0\.1")]
)
def test_a_time_without_a_frame_is_refused(videos, seconds, message):
    with pytest.raises(ValueError, match=message):
        VideoFile(str(videos[0])).frame(seconds, TOLERANCE_S)


def test_a_file_that_is_no_video_is_refused(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"x\.mp4 cannot be decoded"):
        VideoFile(str(path)).frame(0, TOLERANCE_S)


def test_threads_share_a_video(videos):
    video = VideoFile(str(videos[1]))
    order = np.random.default_rng(0).integers(0, FRAMES, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda t: int(video.frame(t / FPS, TOLERANCE_S).mean()), order))
    assert all(abs(each - level(t)) <= 2 for each, t in zip(found, order, strict=True))


def test_odd_sides_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="63 x 64 px cannot be a video: sides are even"):
        VideoEncoder(tmp_path / "x.mp4", FPS, (64, 63, 3), VideoSettings())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"codec": "vp9"}, "known are 'h264'"), ({"crf": 99}, "choose 0"), ({"key_frame_every": 0}, "at least 1")],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        VideoSettings(**values)
