"""Conversion: what was in one format is in the other, whole or not at all, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg

from ipvla.data.conversion import Conversion, ConversionConfig, convert_part, tasks_of_part
from ipvla.data.conversion.columns import columns
from ipvla.data.conversion.comparison import Comparison
from ipvla.data.conversion.plan import open_source
from ipvla.data.lerobot import LeRobotSource, VideoSettings
from ipvla.data.libero_hdf5 import LiberoHdf5Source
from ipvla.data.pictures import EncodedPictures
from ipvla.data.rlds import RldsSource
from ipvla.data.rlds.format import RldsLayout
from ipvla.data.rlds.writer import write_part
from ipvla.data.source import DatasetError, Feature, Trajectory
from tests.data.foreign import write_hdf5
from tests.data.lerobot.conftest import layout, picture, trajectories
from tests.data.lerobot.writing import write_lerobot

LENGTHS = (4, 7, 1, 5, 6)
SHAPES = {"observation/image": (32, 48, 3), "observation/wrist": (16, 16, 3)}
FEATURES = {
    **{path: Feature("image", shape, "uint8") for path, shape in SHAPES.items()},
    "observation/state": Feature("number", (8,), "float32"),
    "observation/depth": Feature("number", (4, 4), "uint16"),
    "action": Feature("number", (7,), "float32"),
    "reward": Feature("number", (), "float32"),
    "discount": Feature("number", (), "float32"),
    "is_terminal": Feature("number", (), "bool"),
    "language_instruction": Feature("text", (), "str"),
    "reasoning": Feature("text", (), "str"),
}
FLAGS = {"is_first": Feature("number", (), "bool"), "is_last": Feature("number", (), "bool")}


def rlds_episode(seed: int, length: int) -> Trajectory:
    rng = np.random.default_rng(seed)
    last = np.arange(length) == length - 1
    steps: dict[str, Any] = {
        path: EncodedPictures(
            tuple(simplejpeg.encode_jpeg(np.ascontiguousarray(picture(seed, t, shape))) for t in range(length))
        )
        for path, shape in SHAPES.items()
    }
    steps |= {
        "observation/state": rng.normal(size=(length, 8)).astype(np.float32),
        "observation/depth": rng.integers(0, 9999, (length, 4, 4)).astype(np.uint16),
        "action": rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        "reward": last.astype(np.float32),
        "discount": np.ones(length, np.float32),
        "is_terminal": last,
        "is_first": np.arange(length) == 0,
        "is_last": last,
        "language_instruction": (f"press button {seed % 2}",) * length,
        "reasoning": tuple(f"step {t}" for t in range(length)),
    }
    return Trajectory(steps, f"episode {seed}", {"file_path": f"/data/{seed}.npy", "success": 1, "family": "f"})


EPISODES = [rlds_episode(seed, length) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def rlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the datasets of Open X-Embodiment are: TFRecord, JPEG of several sizes, metadata of their own."""
    directory = tmp_path_factory.mktemp("rlds") / "robot" / "1.0.0"
    encodings = dict.fromkeys(SHAPES, "jpeg")
    metadata = {"file_path": Feature("text"), "family": Feature("text"), "success": Feature("number", (), "int64")}
    write_part(directory, RldsLayout("robot", {**FEATURES, **FLAGS}, encodings, metadata), EPISODES)
    return directory


def convert(config: ConversionConfig) -> Comparison:
    """A whole conversion in this process."""
    with Conversion.begin(config) as conversion:
        if conversion.needs_tasks:
            conversion.number_tasks([tasks_of_part(conversion.plan, part) for part in conversion.plan.parts])
        for part in conversion.pending():
            convert_part(conversion.plan, part)
        return conversion.publish()


def assert_same(found: Trajectory, expected: Trajectory) -> None:
    assert set(found.steps) == set(expected.steps)
    for name, values in expected.steps.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(found.numbers(name), values)
            assert found.numbers(name).dtype == values.dtype
        elif isinstance(values, tuple):
            assert found.texts(name) == values
        else:
            pictures = found.pictures(name)
            assert isinstance(values, EncodedPictures)
            assert isinstance(pictures, EncodedPictures)
            assert tuple(pictures.encoded) == tuple(values.encoded)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_rlds_to_lerobot_and_back_is_the_same_dataset(rlds, tmp_path, file_format):
    """Pictures are the same files, numbers and texts the same values, and metadata too."""
    there = ConversionConfig(str(rlds), tmp_path / "there", "lerobot", fps=5, episodes_per_part=2)
    compared = convert(there)
    assert (compared.episodes, compared.steps) == (5, sum(LENGTHS))
    assert (compared.greatest_difference, compared.mean_difference) == (0, 0.0)
    back = tmp_path / "robot" / "1.0.0"
    again = ConversionConfig(
        str(there.target), back, "rlds", name="robot", file_format=file_format, episodes_per_part=3
    )
    assert convert(again).digest == compared.digest
    source = RldsSource(back)
    assert source.features == RldsSource(rlds).features
    assert source.lengths.tolist() == list(LENGTHS)
    assert len(list(back.glob(f"robot-train.{file_format}-0000?-of-00002"))) == 2
    for index, expected in enumerate(EPISODES):
        assert_same(source.trajectory(index), expected)
        assert source.trajectory(index).metadata == expected.metadata


def test_lerobot_names_are_its_own(rlds, tmp_path):
    convert(ConversionConfig(str(rlds), tmp_path / "there", "lerobot", fps=5))
    source = LeRobotSource(tmp_path / "there")
    assert source.fps == 5
    assert set(source.features) == {
        *("observation.images.image", "observation.images.wrist", "observation.state", "observation.depth"),
        *("action", "next.reward", "next.done", "discount", "reasoning", "task"),
        *("timestamp", "frame_index", "episode_index", "index", "task_index"),
    }
    assert source.trajectory(1).texts("task") == ("press button 1",) * 7
    assert (source.tasks[1], source.families[1]) == ("press button 1", "f")


def test_video_differs_by_as_much_as_is_told_and_allowed(rlds, tmp_path):
    config = ConversionConfig(
        str(rlds), tmp_path / "video", "lerobot", fps=5, video=VideoSettings(), episodes_per_part=2
    )
    compared = convert(config)
    assert 0 < compared.mean_difference < 6
    assert compared.greatest_difference >= compared.mean_difference
    assert LeRobotSource(config.target).features["observation.images.image"].shape == (32, 48, 3)
    with pytest.raises(DatasetError, match=r"differ by .* levels on average, more than 0\.01; lower crf"):
        convert(replace(config, target=tmp_path / "strict", max_mean_difference=0.01))
    assert not (tmp_path / "strict").exists()


def test_frames_of_a_video_become_png_without_further_loss(tmp_path):
    video = write_lerobot(tmp_path / "video", layout(VideoSettings()), trajectories())
    target = tmp_path / "robot" / "1.0.0"
    compared = convert(ConversionConfig(str(video), target, "rlds", name="robot", episodes_per_part=2))
    assert compared.greatest_difference == 0
    expected, found = LeRobotSource(video).trajectory(3), RldsSource(target).trajectory(3)
    pictures = found.pictures("observation/top")
    assert isinstance(pictures, EncodedPictures)
    assert pictures.encoded[0].startswith(b"\x89PNG")
    np.testing.assert_array_equal(pictures.decode(5), expected.pictures("observation.images.top").decode(5))
    assert found.texts("language_instruction") == expected.texts("task")
    np.testing.assert_array_equal(found.numbers("pose"), expected.numbers("pose").astype(np.float32))
    assert found.metadata["family"] == "recall"


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    directory = tmp_path / "libero_goal"
    directory.mkdir()
    write_hdf5(directory / "open_the_drawer_demo.hdf5", (3,) * 11, {"language_instruction": "open the drawer"})
    write_hdf5(directory / "KITCHEN_SCENE4_close_the_box_demo.hdf5", (4, 5), None)
    return directory


def test_liberos_files_have_the_features_of_openvlas_rlds(hdf5, tmp_path):
    target = tmp_path / "libero_goal_rlds" / "1.0.0"
    compared = convert(ConversionConfig(str(hdf5), target, "rlds", name="libero_goal_rlds", episodes_per_part=4))
    assert (compared.episodes, compared.greatest_difference) == (13, 0)
    source = RldsSource(target)
    assert source.features == {
        **{f"observation/{name}": Feature("image", (16, 16, 3), "uint8") for name in ("image", "wrist_image")},
        "observation/state": Feature("number", (8,), "float32"),
        "observation/joint_state": Feature("number", (7,), "float32"),
        "action": Feature("number", (7,), "float32"),
        "language_instruction": Feature("text", (), "str"),
        **dict.fromkeys(("reward", "discount"), Feature("number", (), "float32")),
        **dict.fromkeys(("is_first", "is_last", "is_terminal"), Feature("number", (), "bool")),
    }
    assert source.tasks == ("close the box",) * 2 + ("open the drawer",) * 11
    with h5py.File(hdf5 / "open_the_drawer_demo.hdf5") as file:
        demo = file["data/demo_10"]  # the last, after demo_9
        episode = source.trajectory(12)
        np.testing.assert_array_equal(episode.numbers("action"), demo["actions"][()].astype(np.float32))
        np.testing.assert_array_equal(
            episode.numbers("observation/state")[:, 6:], np.float32(demo["obs/gripper_states"])
        )
        turned = np.rot90(demo["obs/agentview_rgb"][1], 2)
        np.testing.assert_array_equal(episode.pictures("observation/image").decode(1), turned)
    assert episode.numbers("reward").tolist() == [0, 0, 1]
    assert episode.metadata["file_path"] == "open_the_drawer_demo.hdf5/demo_10"


def test_a_damaged_hdf5_file_names_itself(hdf5):
    path = hdf5 / "open_the_drawer_demo.hdf5"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"open_the_drawer_demo\.hdf5 is no HDF5 file of LIBERO's, or damaged"):
        LiberoHdf5Source(hdf5)


@pytest.fixture
def config(rlds: Path, tmp_path: Path) -> ConversionConfig:
    return ConversionConfig(str(rlds), tmp_path / "target", "lerobot", fps=5, episodes_per_part=2)


def test_a_stopped_conversion_goes_on_with_the_parts_that_are_missing(config, monkeypatch):
    with Conversion.begin(config) as conversion:
        conversion.number_tasks([tasks_of_part(conversion.plan, part) for part in conversion.plan.parts])
        convert_part(conversion.plan, conversion.plan.parts[1])
        with pytest.raises(DatasetError, match="2 of 3 parts are missing"):
            conversion.publish()
    assert not config.target.exists()
    (config.work / ".part-00000.killed.incomplete").mkdir()
    with Conversion.begin(config) as conversion:
        assert [part.number for part in conversion.pending()] == [0, 2]
        assert not list(config.work.glob(".*.incomplete"))
    assert convert(config).episodes == 5
    assert not config.work.exists()


def test_a_part_that_is_there_is_not_converted_again(config):
    with Conversion.begin(config) as conversion:
        conversion.number_tasks([tasks_of_part(conversion.plan, part) for part in conversion.plan.parts])
        first = convert_part(conversion.plan, conversion.plan.parts[0])
        data = next(config.work.glob("part-00000/data/*/*.parquet"))
        before = os.stat(data).st_mtime_ns
        assert convert_part(conversion.plan, conversion.plan.parts[0]) == first
        assert os.stat(data).st_mtime_ns == before


def test_parts_of_other_settings_are_not_used(config):
    with Conversion.begin(config):
        pass
    with pytest.raises(DatasetError, match="holds parts of a conversion with other settings"):
        convert(replace(config, fps=6))


def test_an_existing_target_is_refused(config):
    config.target.mkdir()
    with pytest.raises(DatasetError, match="exists already"):
        convert(config)


def test_two_conversions_to_one_target_do_not_mix(config):
    with (
        Conversion.begin(config),
        pytest.raises(DatasetError, match="another process is writing"),
        Conversion.begin(config),
    ):
        pass


def test_the_plan_can_be_sent_to_workers(config):
    with Conversion.begin(config) as conversion:
        assert pickle.loads(pickle.dumps(conversion.plan)) == conversion.plan


def test_the_dataset_says_what_it_was_made_of(config):
    compared = convert(config)
    told = json.loads((config.target / "conversion.json").read_text())
    assert told["source"] == config.source
    assert (told["episodes"], told["steps"], told["actions_sha256"]) == (5, sum(LENGTHS), compared.digest)
    assert told["features"]["observation/image"] == "observation.images.image"


@pytest.mark.parametrize("changed", ["action", "reasoning"])
def test_a_writer_that_changes_a_value_is_found(config, monkeypatch, changed):
    """Stands for any defect between reading and writing."""

    def spoiled(
        self: LeRobotSource, index: int, read: Callable[..., Trajectory] = LeRobotSource.trajectory
    ) -> Trajectory:
        found = read(self, index)
        values = found.steps[changed]
        other: Any = values * np.float64(1.0000001) if isinstance(values, np.ndarray) else values[::-1]
        return replace(found, steps={**found.steps, changed: other})

    monkeypatch.setattr(LeRobotSource, "trajectory", spoiled)
    with pytest.raises(DatasetError, match=f"{changed!r} was written as something else"):
        convert(config)
    assert not config.target.exists()


def test_a_broken_source_episode_stops_its_part_and_names_itself(rlds, tmp_path):
    copy = Path(shutil.copytree(rlds, tmp_path / "robot" / "1.0.0"))
    shard = next(copy.glob("*.tfrecord-*"))
    content = bytearray(shard.read_bytes())
    content[-200] ^= 255
    shard.write_bytes(content)
    config = ConversionConfig(str(copy), tmp_path / "t", "lerobot", fps=5, episodes_per_part=2)
    with pytest.raises(DatasetError, match="episode 4 is corrupt"):
        convert(config)


def test_features_that_lerobot_cannot_hold_can_be_left_out(tmp_path):
    features = {
        "observation/depth": Feature("image", (4, 4, 1), "uint8"),
        "action": Feature("number", (7,), "float32"),
    }
    found = columns(features, "rlds", "lerobot", leave_out=["observation/depth"])
    assert list(found.features) == ["action"]
    with pytest.raises(DatasetError, match=r"leave_out names \['dept'\]"):
        columns(features, "rlds", "lerobot", leave_out=["dept"])


def test_two_features_of_one_name_are_refused():
    features = dict.fromkeys(("observation/a", "observation.a"), Feature("number", (7,), "float32"))
    with pytest.raises(DatasetError, match=r"would both be 'observation\.a'"):
        columns(features, "rlds", "lerobot")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "fps is None: .* give --fps"),
        ({"leave_out": ("nothing",)}, "leave_out names"),
        ({"source": "/nowhere"}, "/nowhere does not exist"),
        ({"source": "/usr"}, "neither an RLDS version directory"),
        ({"to": "rlds", "name": "My-Name"}, "no name of an RLDS dataset"),
        ({"to": "rlds", "name": "x", "file_format": "riegeli"}, "known are tfrecord, array_record"),
    ],
)
def test_what_cannot_be_converted_is_told_before_anything_is(config, changes, message):
    with pytest.raises(DatasetError, match=message):
        convert(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"to": "zarr"}, "choose 'lerobot' or 'rlds'"), ({"episodes_per_part": 0}, "at least 1")],
)
def test_settings_are_checked(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_source_is_opened_by_what_lies_there(rlds, hdf5, tmp_path):
    lerobot = write_lerobot(tmp_path / "l", layout(), trajectories())
    opened = [type(open_source(str(each), tmp_path / "cache")) for each in (rlds, lerobot, hdf5)]
    assert opened == [RldsSource, LeRobotSource, LiberoHdf5Source]


def test_pixels_are_compared(tmp_path):
    def with_level(level: int) -> npt.NDArray[np.uint8]:
        return np.full((8, 8, 3), level, np.uint8)

    from ipvla.data.conversion.comparison import compare
    from ipvla.data.pictures import encode_png

    def one(level: int) -> Trajectory:
        return Trajectory(
            {"image": EncodedPictures((encode_png(with_level(level)),)), "action": np.ones((1, 2))}, "e"
        )

    compared = compare(one(10), one(13))
    assert (compared.greatest_difference, compared.mean_difference, compared.pixels) == (3, 3.0, 192)
    assert compare(one(10), one(10)).pixels == 0
