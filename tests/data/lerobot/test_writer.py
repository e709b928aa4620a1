"""A LeRobotDataset v3 appears whole or not at all, laid out and described as lerobot 0.4 reads it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipvla.data.lerobot import Layout, LeRobotSource, VideoSettings
from ipvla.data.pictures import EncodedPictures
from ipvla.data.source import DatasetError, Feature, Trajectory
from ipvla.storage import SOURCE_TREE
from tests.data.lerobot.conftest import FPS, LENGTHS, SIZES, TOP, WRIST, layout, trajectories, trajectory
from tests.data.lerobot.writing import write_lerobot


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lerobot(tmp_path_factory.mktemp("w") / "images", layout(), trajectories(), episodes_per_part=2)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lerobot(tmp_path_factory.mktemp("w") / "video", layout(VideoSettings()), trajectories(), 2)


def test_files_lie_where_the_format_says(video):
    names = {str(path.relative_to(video)) for path in video.rglob("*") if path.is_file()}
    numbered = [f"chunk-000/file-{part:03d}" for part in range(3)]
    assert names == {
        *("meta/info.json", "meta/stats.json", "meta/tasks.parquet"),
        *(f"meta/episodes/{each}.parquet" for each in numbered),
        *(f"data/{each}.parquet" for each in numbered),
        *(f"videos/{name}/{each}.mp4" for each in numbered for name in SIZES),
    }


def test_information_counts_and_describes_every_feature(images):
    info = json.loads((images / "meta" / "info.json").read_text())
    features = info.pop("features")
    assert info == {
        **{"codebase_version": "v3.0", "robot_type": "panda", "fps": FPS, "splits": {"train": "0:5"}},
        **{"total_episodes": 5, "total_frames": sum(LENGTHS), "total_tasks": 3},
        **{"chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    assert features[TOP] == {"dtype": "image", "shape": [64, 96, 3], "names": ["height", "width", "channels"]}
    assert features["reasoning"] == {"dtype": "string", "shape": [1], "names": None}
    counters = ("frame_index", "episode_index", "index", "task_index")
    index = {"timestamp": "float32", **dict.fromkeys(counters, "int64")}
    assert {name: features[name] for name in index} == {
        name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in index.items()
    }


def test_columns_have_lerobots_types(images, video):
    schema = pq.read_schema(images / "data" / "chunk-000" / "file-000.parquet")
    assert schema.field("action").type == pa.list_(pa.float32(), 7)
    assert schema.field("next.done").type == pa.bool_()
    assert schema.field("pose").type == pa.list_(pa.list_(pa.float64(), 3), 2)
    assert schema.field(TOP).type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert not set(SIZES) & set(pq.read_schema(video / "data" / "chunk-000" / "file-000.parquet").names)


def test_an_episodes_row_tells_its_place_in_every_file(video):
    rows = pd.concat(map(pd.read_parquet, sorted((video / "meta" / "episodes").rglob("*.parquet"))))
    assert rows["episode_index"].tolist() == list(range(5))
    assert rows["length"].tolist() == list(LENGTHS)
    ends = np.cumsum(LENGTHS)
    assert rows["dataset_to_index"].tolist() == ends.tolist()
    assert rows["dataset_from_index"].tolist() == (ends - LENGTHS).tolist()
    for prefix in ("data", "meta/episodes", f"videos/{TOP}", f"videos/{WRIST}"):
        assert rows[f"{prefix}/chunk_index"].tolist() == [0] * 5
        assert rows[f"{prefix}/file_index"].tolist() == [0, 0, 1, 1, 2]
    starts, stops = ([0.0, 0.5, 0.0, 0.1, 0.0], [0.5, 1.4, 0.1, 1.3, 0.7])
    np.testing.assert_allclose(rows[f"videos/{TOP}/from_timestamp"], starts)
    np.testing.assert_allclose(rows[f"videos/{TOP}/to_timestamp"], stops)
    assert rows["tasks"].map(list).tolist() == [[f"press button {seed % 3}"] for seed in range(5)]


def test_tasks_are_pandas_index(images):
    tasks = pd.read_parquet(images / "meta" / "tasks.parquet")
    assert [tasks.iloc[number].name for number in range(3)] == [f"press button {number}" for number in range(3)]
    assert tasks["task_index"].tolist() == [0, 1, 2]


def test_statistics_of_the_dataset_are_those_of_all_its_steps(images):
    stats = json.loads((images / "meta" / "stats.json").read_text())
    actions = np.concatenate([each.numbers("action") for each in trajectories()])
    told = stats["action"]
    assert told["count"] == [sum(LENGTHS)]
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(told[name], getattr(actions, name)(0), rtol=1e-4)
    assert set(told) == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    assert set(stats) == set(layout().features) - {"reasoning"} | {
        *("timestamp", "frame_index", "episode_index", "index", "task_index")
    }


def test_statistics_of_pictures_are_per_channel_and_of_one(images):
    told = json.loads((images / "meta" / "stats.json").read_text())[TOP]
    frames = [each.pictures(TOP).decode(t) / 255 for each in trajectories() for t in range(len(each))]
    pixels = np.concatenate([frame.reshape(-1, 3) for frame in frames])
    for name in ("min", "max", "mean", "std"):
        assert np.shape(told[name]) == (3, 1, 1)
        np.testing.assert_allclose(np.ravel(told[name]), getattr(pixels, name)(0), rtol=1e-5)


def test_jpeg_stays_as_it_is(tmp_path):
    import simplejpeg

    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    encoded = tuple(simplejpeg.encode_jpeg(frame) for frame in frames)
    steps = {"observation.images.a": EncodedPictures(encoded), "action": np.zeros((3, 7), np.float32)}
    features = {
        "observation.images.a": Feature("image", (16, 16, 3), "uint8"),
        "action": Feature("number", (7,), "float32"),
    }
    target = write_lerobot(tmp_path / "j", Layout(5, features), [Trajectory(steps, "episode 0")])
    found = LeRobotSource(target).trajectory(0).pictures("observation.images.a")
    assert isinstance(found, EncodedPictures)
    assert found.encoded == encoded


def changed(**steps: object) -> Trajectory:
    each = trajectory(1, 4)
    return replace(each, steps={**each.steps, **steps})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (changed(action=np.zeros((4, 6), np.float32)), r"'action': \(4, 6\), and the dataset has \(4, 7\)"),
        (changed(**{TOP: trajectory(1, 4).steps[WRIST]}), r"pictures of \(48, 64, 3\)"),
        (changed(**{TOP: EncodedPictures((b"", b"", b"", b""))}), "cannot be used: 0 bytes"),
        (replace(trajectory(1, 4), steps={"action": np.zeros((4, 7), np.float32)}), "there is no step feature"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path, broken, message):
    with pytest.raises(DatasetError, match=message):
        write_lerobot(tmp_path / "bad", layout(), [trajectory(0, 3), broken])
    assert [path.name for path in tmp_path.iterdir()] == [".bad.lock"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a/b": Feature("number", (1,))}, "'a/b' cannot have this name"),
        ({"task": Feature("text")}, "'task' cannot have this name"),
        ({"gray": Feature("image", (4, 4, 1), "uint8")}, r"\[4, 4, 1\], no \[H, W, 3\] picture; leave it out"),
        ({"depth": Feature("image", (4, 4, 2), "uint16")}, r"\[4, 4, 2\], no \[H, W, 1\] picture; leave it"),
        ({"points": Feature("number", (0, 3))}, "its size varies"),
    ],
)
def test_features_that_the_format_cannot_hold_are_refused(features, message):
    with pytest.raises(DatasetError, match=message):
        Layout(5, features)


def test_a_frame_rate_is_needed():
    with pytest.raises(DatasetError, match="fps is 0"):
        Layout(0, {})


def test_no_episodes_are_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match="no episodes"):
        write_lerobot(tmp_path / "empty", layout(), [])
    assert not (tmp_path / "empty").exists()


def test_an_existing_dataset_is_never_overwritten(images):
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    with pytest.raises(DatasetError, match="exists already"):
        write_lerobot(images, layout(), trajectories())
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before


def test_two_writers_of_one_dataset_do_not_mix(tmp_path):
    def episodes() -> Iterator[Trajectory]:
        yield trajectory(0, 4)
        with pytest.raises(DatasetError, match="another process is writing"):
            write_lerobot(tmp_path / "contested", layout(), [trajectory(1, 9)])

    assert LeRobotSource(write_lerobot(tmp_path / "contested", layout(), episodes())).lengths.tolist() == [4]


_KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.data.lerobot.writing import write_lerobot
    from tests.data.lerobot.conftest import layout, trajectory

    def episodes():
        yield trajectory(0, 4)
        os.kill(os.getpid(), signal.SIGKILL)

    write_lerobot(Path(sys.argv[1]), layout(), episodes(), 1)
"""


def test_a_killed_writer_leaves_no_dataset_and_does_not_stand_in_the_way(tmp_path):
    code = "\n".join(line[4:] for line in _KILLED.splitlines())
    environment = os.environ | {"PYTHONPATH": str(SOURCE_TREE)}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "k")], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "k").exists()
    assert list(tmp_path.glob(".k.*.incomplete")), "the writer was killed too early to test anything"
    write_lerobot(tmp_path / "k", layout(), [trajectory(1, 6)])
    assert LeRobotSource(tmp_path / "k").lengths.tolist() == [6]
    assert not list(tmp_path.glob(".k.*.incomplete"))
