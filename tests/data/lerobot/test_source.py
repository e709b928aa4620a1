"""LeRobotDataset v3 is read as it was written, from disks and object storage, and damage is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipvla.data.dataset import open_dataset
from ipvla.data.lerobot import LeRobotSource, VideoSettings
from ipvla.data.lerobot.video import VideoFile
from ipvla.data.source import BrokenEpisodeError, DatasetError, Trajectory
from ipvla.data.standards import StandardConfig, standard_for
from tests.data.lerobot.conftest import FPS, LENGTHS, SIZES, TOP, layout, trajectories
from tests.data.lerobot.writing import write_lerobot

KINDS = {"images": None, "video": VideoSettings()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A dataset directory that no test may change."""
    root = tmp_path_factory.mktemp("lerobot")

    def get(kind: str) -> Path:
        if not (root / kind).exists():
            write_lerobot(root / kind, layout(KINDS[kind]), trajectories(), episodes_per_part=2)
        return root / kind

    return get


@pytest.fixture
def copy(written: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(written("images"), tmp_path / "copy"))


def assert_equal(found: Trajectory, expected: Trajectory, tolerance: int) -> None:
    for name, values in expected.steps.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(found.numbers(name), values)
            assert found.numbers(name).dtype == values.dtype
        elif isinstance(values, tuple):
            assert found.texts(name) == values
        else:
            for t in range(len(values)):
                difference = np.abs(found.pictures(name).decode(t).astype(int) - values.decode(t))
                assert difference.max() <= tolerance, (name, t)
    assert found.metadata == expected.metadata


@pytest.mark.parametrize(("kind", "tolerance"), [("images", 0), ("video", 9)])
def test_every_episode_is_what_was_written_in_any_order(written, kind, tolerance):
    source = LeRobotSource(written(kind))
    assert (source.name, source.fps, source.lengths.tolist()) == (kind, FPS, list(LENGTHS))
    assert source.tasks == tuple(f"task_{seed % 3}" for seed in range(len(LENGTHS)))
    assert source.families == ("recall",) * len(LENGTHS)
    for index in (3, 0, 4, 2, 1):
        assert_equal(source.trajectory(index), trajectories()[index], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_told_with_their_kinds_shapes_and_types(written, kind):
    source = LeRobotSource(written(kind))
    assert {name: source.features[name] for name in layout().features} == dict(layout().features)
    assert source.features["task"].kind == "text"
    assert set(source.trajectory(0).steps) == set(source.features)


def test_index_columns_tell_time_and_place(written):
    episode = LeRobotSource(written("images")).trajectory(3)
    np.testing.assert_allclose(episode.numbers("timestamp"), np.arange(12) / FPS, atol=1e-6)
    assert episode.numbers("index").tolist() == list(range(15, 27))
    assert set(episode.numbers("episode_index")) == {3}


@pytest.mark.parametrize("index", [-1, 5])
def test_an_episode_outside_the_dataset_is_an_index_error(written, index):
    with pytest.raises(IndexError, match=f"episode {index} is outside the 5 episodes"):
        LeRobotSource(written("images")).trajectory(index)


def test_only_the_row_group_of_the_episode_is_read(written, monkeypatch):
    groups = []
    read = pq.ParquetFile.read_row_groups

    def counted(file: Any, row_groups: list[int], **kwargs: Any) -> Any:
        groups.append((file.num_row_groups, row_groups))
        return read(file, row_groups, **kwargs)

    source = LeRobotSource(written("images"))
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    source.trajectory(3)
    assert groups == [(2, [1])]


def test_files_of_one_large_row_group_are_read_too(copy):
    for path in (copy / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path), path)
    source = LeRobotSource(copy)
    for index, expected in enumerate(trajectories()):
        assert_equal(source.trajectory(index), expected, 0)


def test_no_frame_is_decoded_before_it_is_looked_at(written, monkeypatch):
    def decoded(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(VideoFile, "frame", decoded)
    pictures = LeRobotSource(written("video")).trajectory(1).pictures(TOP)
    assert (len(pictures), pictures.nbytes) == (9, 72)
    with pytest.raises(AssertionError, match="decoded"):
        pictures.decode(0)


@pytest.fixture
def remote(written: Callable[[str], Path]) -> Callable[[str], str]:
    """The address of a dataset in an object store, here one in memory."""

    def get(kind: str) -> str:
        fsspec.filesystem("memory").put(str(written(kind)), f"/bucket/{kind}", recursive=True)
        return f"memory://bucket/{kind}"

    return get


def test_a_dataset_of_images_is_read_from_object_storage(remote):
    source = LeRobotSource(remote("images"))
    assert_equal(source.trajectory(3), trajectories()[3], 0)


def test_remote_videos_are_fetched_once_when_they_are_wanted(remote, tmp_path):
    cache = tmp_path / "cache"
    pictures = LeRobotSource(remote("video"), cache).trajectory(1).pictures(TOP)
    assert not cache.exists()
    before = pictures.decode(4)
    (copied,) = cache.iterdir()
    fsspec.filesystem("memory").rm("/bucket/video/videos", recursive=True)
    again = LeRobotSource("memory://bucket/video", cache).trajectory(1).pictures(TOP)
    np.testing.assert_array_equal(again.decode(4), before)
    assert [*cache.iterdir()] == [copied]


def test_remote_videos_want_a_directory_for_copies(remote):
    pictures = LeRobotSource(remote("video")).trajectory(1).pictures(TOP)
    with pytest.raises(DatasetError, match=r"file-000\.mp4 is remote, .*cache_directory"):
        pictures.decode(0)


def change_info(directory: Path, **values: object) -> None:
    path = directory / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_features(directory: Path, **features: object) -> None:
    path = directory / "meta" / "info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"features": info["features"] | features}))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("v2.1", r"Dataset v2\.1, and v3 is read here; convert it with `python -m lerobot.*v21_to_v30.*copy"),
        ("v2.0", r"v2\.0, .* convert it to v2\.1 with an older lerobot first, and then"),
        ("v1.6", r"v1\.6, .* lerobot package of that version"),
        ("v4.0", r"v4\.0, .* lerobot package of that version"),
    ],
)
def test_another_version_says_which_it_is_and_how_to_convert_it(copy, version, message):
    change_info(copy, codebase_version=version)
    with pytest.raises(DatasetError, match=message):
        LeRobotSource(copy)


def test_a_directory_that_is_none_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"holds no meta/info\.json; give the directory"):
        LeRobotSource(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"codebase_version": "v3.0"}'])
def test_damaged_information_is_one_line(copy, content):
    (copy / "meta" / "info.json").write_text(content)
    with pytest.raises(DatasetError, match=r"info\.json is damaged") as caught:
        LeRobotSource(copy)
    assert "\n" not in str(caught.value)


def test_the_conversion_is_the_one_that_lerobot_has(copy):
    change_info(copy, codebase_version="v2.1")
    with pytest.raises(DatasetError, match=r"lerobot\.scripts\.convert_dataset.*before lerobot 0\.5\.1"):
        LeRobotSource(copy)


def test_what_is_neither_picture_text_nor_number_is_left_out(copy):
    change_features(copy, language_persistent={"dtype": "language", "shape": [1], "names": None})
    source = LeRobotSource(copy)
    assert "language_persistent" not in source.features
    assert len(source.trajectory(0)) == LENGTHS[0]


def test_depth_is_no_camera(copy):
    info = json.loads((copy / "meta" / "info.json").read_text())
    change_features(copy, **{TOP: info["features"][TOP] | {"info": {"is_depth_map": True}}})
    dataset = open_dataset(copy)
    assert dataset.cameras == ("wrist",)
    with pytest.raises(DatasetError, match=r"'observation\.images\.top' holds depth"):
        open_dataset(copy, standard=StandardConfig({"top": TOP}))


def test_sixteen_bits_that_nobody_marked_as_depth_are_no_camera_either(copy):
    deep = cv2.imencode(".png", np.full((4, 4), 1000, np.uint16))[1].tobytes()
    (path,) = copy.glob("data/chunk-000/file-000.parquet")
    table = pq.read_table(path)
    column = pa.array([{"bytes": deep, "path": None}] * len(table), table[TOP].type)
    pq.write_table(table.set_column(table.column_names.index(TOP), TOP, column), path)
    with pytest.raises(BrokenEpisodeError, match="16 bits per channel: depth"):
        open_dataset(copy).frame(0, 0, "top")


def test_one_camera_may_be_called_observation_image(copy):
    features = dict(LeRobotSource(copy).features)
    one = {"observation.image" if path == TOP else path: f for path, f in features.items() if "wrist" not in path}
    standard = standard_for("pusht", one)
    assert standard.cameras == {"image": "observation.image"}
    assert standard.gripper == "none"


def test_a_standard_of_cameras_alone_begins_with_lerobots_names(copy):
    dataset = open_dataset(copy, standard=StandardConfig({"above": TOP}))
    assert dataset.cameras == ("above",)
    assert (dataset.standard.gripper, dataset.episode(0).instruction) == ("none", "press button 0")


def test_episodes_that_were_taken_out_are_told(copy):
    for path in sorted(copy.glob("meta/episodes/*/*.parquet")):
        table = pq.read_table(path)
        numbers = pa.array([n + (n > 1) for n in table["episode_index"].to_pylist()], pa.int64())
        pq.write_table(table.set_column(table.column_names.index("episode_index"), "episode_index", numbers), path)
    with pytest.raises(DatasetError, match=r"goes from episode 1 to 3: .*lerobot-edit-dataset"):
        LeRobotSource(copy)


def test_a_video_that_git_has_not_fetched_is_told(written, tmp_path):
    directory = Path(shutil.copytree(written("video"), tmp_path / "copy"))
    for path in directory.rglob("*.mp4"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(BrokenEpisodeError, match=r"mp4 cannot be read: it is a pointer of Git LFS.*git lfs pull"):
        open_dataset(directory).frame(0, 0, "top")


def test_missing_episodes_are_counted(copy):
    (copy / "meta" / "episodes" / "chunk-000" / "file-001.parquet").unlink()
    with pytest.raises(DatasetError, match=r"lists 3 episodes of 21 frames, and meta/info\.json says 5 of 34"):
        LeRobotSource(copy)


@pytest.mark.parametrize("name", ["tasks.parquet", "episodes/chunk-000/file-000.parquet"])
def test_damaged_metadata_names_its_file(copy, name):
    path = copy / "meta" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DatasetError, match=rf"meta/{name} is .*damaged"):
        LeRobotSource(copy)


def test_a_truncated_data_file_breaks_its_episodes_alone(copy):
    path = copy / "data" / "chunk-000" / "file-001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    source = LeRobotSource(copy)
    assert len(source.trajectory(1)) == 9
    with pytest.raises(BrokenEpisodeError, match=r"file-001\.parquet, episode 3 cannot be read"):
        source.trajectory(3)


def test_rows_of_another_episode_are_found(copy):
    path = copy / "data" / "chunk-000" / "file-001.parquet"
    table = pq.read_table(path)
    column = table.column_names.index("episode_index")
    pq.write_table(table.set_column(column, "episode_index", pa.array([7] * table.num_rows)), path)
    with pytest.raises(BrokenEpisodeError, match=r"episode 3 .* rows are of episodes \[7\]"):
        LeRobotSource(copy).trajectory(3)


def test_a_missing_video_is_told_when_it_is_wanted(written, tmp_path):
    directory = Path(shutil.copytree(written("video"), tmp_path / "copy"))
    shutil.rmtree(directory / "videos" / TOP)
    pictures = LeRobotSource(directory).trajectory(0).pictures(TOP)
    with pytest.raises(ValueError, match=r"file-000\.mp4 cannot be decoded at 0\.0000 s"):
        pictures.decode(0)


def test_pictures_beside_the_rows_are_found_by_their_path(copy):
    path = copy / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    encoded = table[TOP].to_pylist()
    for t, each in enumerate(encoded):
        (copy / "images").mkdir(exist_ok=True)
        (copy / "images" / f"{t}.png").write_bytes(each["bytes"])
    moved = pa.array([{"bytes": None, "path": f"images/{t}.png"} for t in range(len(encoded))], table[TOP].type)
    pq.write_table(table.set_column(table.column_names.index(TOP), TOP, moved), path)
    assert_equal(LeRobotSource(copy).trajectory(1), trajectories()[1], 0)
    assert LeRobotSource(copy).trajectory(1).pictures(TOP).decode(0).shape == SIZES[TOP]
