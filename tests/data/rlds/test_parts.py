"""An RLDS dataset in parts: each is one, and together they are one, read by tfds too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.rlds import RldsSource
from ipvla.data.rlds.format import RldsLayout, nested
from ipvla.data.rlds.writer import assemble, write_part
from ipvla.data.source import DatasetError, Feature, Trajectory

SHAPES = {"observation/left": (6, 8, 3), "observation/hand/eye": (4, 4, 3)}
FEATURES = {
    **{path: Feature("image", shape, "uint8") for path, shape in SHAPES.items()},
    "observation/state": Feature("number", (3,), "float32"),
    "action/arm": Feature("number", (6,), "float32"),
    "action/gripper": Feature("number", (), "int64"),
    "language_instruction": Feature("text", (), "str"),
}
METADATA = {"file_path": Feature("text", (), "str"), "info/score": Feature("number", (2,), "float32")}


def layout(**changes: object) -> RldsLayout:
    values = {
        "name": "robot",
        "features": FEATURES,
        "encodings": dict.fromkeys(SHAPES, "png"),
        "metadata": METADATA,
    }
    return RldsLayout(**(values | changes))  # type: ignore[arg-type]


def episode(seed: int, length: int) -> Trajectory:
    rng = np.random.default_rng(seed)
    steps = {
        path: EncodedPictures(
            tuple(encode_png(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(length))
        )
        for path, shape in SHAPES.items()
    }
    numbers = {
        "observation/state": rng.normal(size=(length, 3)).astype(np.float32),
        "action/arm": rng.normal(size=(length, 6)).astype(np.float32),
        "action/gripper": rng.integers(0, 2, length),
        "language_instruction": (f"do {seed}",) * length,
    }
    return Trajectory(
        {**steps, **numbers}, f"episode {seed}", {"file_path": f"/{seed}", "info/score": [1.0, seed]}
    )


EPISODES = [episode(seed, length) for seed, length in enumerate((3, 1, 4, 2, 5))]


def write(root: Path, file_format: str) -> Path:
    parts = [root / f"part{number}" for number in range(3)]
    for part, episodes in zip(parts, (EPISODES[:2], EPISODES[2:3], EPISODES[3:]), strict=True):
        write_part(part, layout(file_format=file_format), episodes)
    directory = root / "robot" / "1.0.0"
    directory.mkdir(parents=True)
    assemble(parts, directory, layout(file_format=file_format))
    return directory


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_parts_together_are_the_dataset(tmp_path, file_format):
    source = RldsSource(write(tmp_path, file_format))
    assert source.features == FEATURES
    assert source.lengths.tolist() == [3, 1, 4, 2, 5]
    assert source.tasks == tuple(f"do {seed}" for seed in range(5))
    for index, expected in enumerate(EPISODES):
        found = source.trajectory(index)
        for path, values in expected.steps.items():
            if isinstance(values, np.ndarray):
                np.testing.assert_array_equal(found.numbers(path), values)
            elif isinstance(values, tuple):
                assert found.texts(path) == values
            else:
                assert tuple(found.pictures(path).encoded) == tuple(values.encoded)  # type: ignore[attr-defined]
        assert found.metadata["file_path"] == f"/{index}"
        np.testing.assert_array_equal(found.metadata["info/score"], [1, index])


def test_a_part_is_a_dataset_of_its_own(tmp_path):
    write(tmp_path, "tfrecord")
    assert RldsSource(tmp_path / "part1").lengths.tolist() == [4]


def test_records_are_sound_when_they_are_read_without_the_list_of_episodes(tmp_path):
    """Reads and checks every record."""
    directory = write(tmp_path, "tfrecord")
    (directory / "episodes.json").unlink()
    assert RldsSource(directory).lengths.tolist() == [3, 1, 4, 2, 5]


def test_tfds_reads_it_and_knows_its_shards(tmp_path):
    builder = tfds.builder_from_directory(write(tmp_path, "array_record"))
    split = builder.info.splits["train"]
    assert (split.num_examples, split.shard_lengths, builder.version) == (5, [2, 1, 2], "1.0.0")
    records = builder.as_data_source(split="train", decoders={"steps": tfds.decode.SkipDecoding()})
    assert (
        records[4]["steps"]["observation"]["hand"]["eye"][0]
        == EPISODES[4].steps["observation/hand/eye"].encoded[0]
    )


def test_a_shard_written_by_a_dead_worker_is_no_part(tmp_path):
    def dying() -> Iterator[Trajectory]:
        yield EPISODES[0]
        raise RuntimeError("the worker died")

    with pytest.raises(RuntimeError, match="the worker died"):
        write_part(tmp_path / "part", layout(), dying())
    assert not (tmp_path / "part" / "dataset_info.json").exists()


def test_no_episodes_are_no_part(tmp_path):
    with pytest.raises(DatasetError, match="no episodes"):
        write_part(tmp_path / "part", layout(), [])


@pytest.mark.parametrize(
    ("features", "metadata", "message"),
    [
        ({"action/arm": Feature("number", (5,), "float32")}, METADATA, "episode 0 does not fit"),
        ({"nothing": Feature("number", (5,), "float32")}, METADATA, "there is no step feature 'nothing'"),
        (FEATURES, {"seed": Feature("number", (), "int64")}, r"no metadata \['seed'\]"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(tmp_path, features, metadata, message):
    with pytest.raises(DatasetError, match=message):
        write_part(tmp_path / "part", layout(features=features, metadata=metadata), EPISODES)


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a")])
def test_a_feature_cannot_lie_within_another(paths):
    with pytest.raises(DatasetError, match="leave"):
        nested(dict.fromkeys(paths, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": "Robot"}, "no name of an RLDS dataset"), ({"file_format": "riegeli"}, "known are tfrecord")],
)
def test_names_and_formats_are_checked(changes, message):
    with pytest.raises(DatasetError, match=message):
        layout(**changes)


def test_the_description_is_kept(tmp_path):
    write_part(tmp_path / "part", layout(description="10 control steps per second"), EPISODES)
    assert json.loads((tmp_path / "part" / "dataset_info.json").read_text())["description"].startswith(
        "10 control"
    )
