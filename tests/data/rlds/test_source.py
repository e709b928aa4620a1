"""RLDS as TensorFlow wrote it: read without TensorFlow to the last bit, from disk and object storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ipvla.data.rlds import RldsSource
from ipvla.data.source import BrokenEpisodeError, DatasetError, Feature
from ipvla.data.sources import open_source
from tests.data.tensorflow.write import LENGTHS, NAME, SIZE

TENSORFLOW = Path(__file__).parents[1] / "tensorflow"
WRITTEN = TENSORFLOW / NAME / "1.0.0"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(WRITTEN, tmp_path / NAME / "1.0.0"))


def _shard(directory: Path, number: int = 0) -> Path:
    return directory / f"{NAME}-train.tfrecord-{number:05d}"


def test_pictures_and_numbers_are_those_that_tensorflow_reads() -> None:
    source = RldsSource(WRITTEN)
    read = [source.trajectory(index) for index in range(len(source))]
    with np.load(TENSORFLOW / "expected.npz") as expected:
        for camera in ("image", "wrist_image"):
            frames = [t.pictures(f"observation/{camera}").decode(step) for t in read for step in range(len(t))]
            np.testing.assert_array_equal(np.stack(frames), expected[camera])
        for name, path in {"state": "observation/state", "action": "action"}.items():
            np.testing.assert_array_equal(np.concatenate([t.numbers(path) for t in read]), expected[name])


def test_a_source_tells_what_is_in_it() -> None:
    source = RldsSource(WRITTEN)
    assert (source.name, source.lengths.tolist()) == (NAME, list(LENGTHS))
    assert source.tasks == tuple(f"pick up the bowl number {seed}" for seed in range(3))
    assert source.families == ("",) * 3
    assert source.features["observation/image"] == Feature("image", (SIZE, SIZE, 3), "uint8")
    assert source.features["observation/state"] == Feature("number", (8,), "float32")
    assert source.features["language_instruction"] == Feature("text", (), "str")
    assert source.trajectory(2).metadata == {"file_path": "/data/2.hdf5"}
    assert source.trajectory(1).texts("language_instruction") == ("pick up the bowl number 1",) * 6


def test_object_storage_gives_the_same() -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(WRITTEN), "/bucket/1.0.0", recursive=True)
    local, remote = RldsSource(WRITTEN), RldsSource("memory://bucket/1.0.0")
    assert remote.lengths.tolist() == local.lengths.tolist()
    for index in range(len(local)):
        np.testing.assert_array_equal(
            remote.trajectory(index).numbers("action"), local.trajectory(index).numbers("action")
        )


@pytest.mark.parametrize(
    ("address", "message"), [("nowhere://bucket/1.0.0", "Protocol not known: nowhere"), ("gs://b/1.0.0", "gcsfs")]
)
def test_an_address_that_nothing_installed_knows_is_told(address: str, message: str) -> None:
    with pytest.raises(DatasetError, match=f"cannot be reached: .*{message}"):
        open_source(address)


def test_a_kept_index_spares_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RldsSource(WRITTEN, index_root=tmp_path)
    monkeypatch.setattr(RldsSource, "_make_index", lambda *_: pytest.fail("the dataset was read again"))
    again = RldsSource(WRITTEN, index_root=tmp_path)
    assert again.lengths.tolist() == first.lengths.tolist()
    assert again.tasks == first.tasks
    np.testing.assert_array_equal(again.trajectory(1).numbers("action"), first.trajectory(1).numbers("action"))


def test_an_index_of_other_shards_is_made_anew(copy: Path, tmp_path: Path) -> None:
    RldsSource(copy, index_root=tmp_path / "indices")
    _shard(copy, 1).write_bytes(b"")
    with pytest.raises(DatasetError, match="0 of 1 episodes are readable"):
        RldsSource(copy, index_root=tmp_path / "indices")


def test_a_truncated_shard_names_itself_and_what_is_left(copy: Path) -> None:
    shard = _shard(copy)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=rf"{shard.name} is truncated or corrupt .*: 1 of 2 episodes"):
        RldsSource(copy)


def test_a_wrong_checksum_names_dataset_shard_and_episode(copy: Path) -> None:
    shard = _shard(copy)
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(
        BrokenEpisodeError, match=rf"{NAME}: .*{shard.name}, episode 1 is corrupt \(wrong checksum"
    ):
        RldsSource(copy)


def test_bad_episodes_can_be_left_out_and_are_counted(copy: Path) -> None:
    content = bytearray(_shard(copy).read_bytes())
    content[200] ^= 1
    _shard(copy).write_bytes(bytes(content))
    source = RldsSource(copy, skip_bad_episodes=True)
    assert source.lengths.tolist() == list(LENGTHS[1:])
    assert len(source.broken) == 1
    whole = RldsSource(WRITTEN)
    np.testing.assert_array_equal(source.trajectory(0).numbers("action"), whole.trajectory(1).numbers("action"))


def test_episodes_behind_a_truncation_are_counted_too(copy: Path) -> None:
    _shard(copy, 1).write_bytes(_shard(copy, 1).read_bytes()[:50])
    source = RldsSource(copy, skip_bad_episodes=True)
    assert source.lengths.tolist() == list(LENGTHS[:2])
    assert len(source.broken) == 1


def test_features_that_disagree_with_the_records_are_told(copy: Path) -> None:
    features = (copy / "features.json").read_text()
    (copy / "features.json").write_text(features.replace('"state"', '"pose"'))
    with pytest.raises(BrokenEpisodeError, match=r"episode 0 is not what features\.json says"):
        RldsSource(copy)


def test_an_empty_split_is_told(copy: Path) -> None:
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"][0] |= {"shardLengths": [], "numBytes": "0"}
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="split 'train' has no episodes"):
        RldsSource(copy)


def test_a_split_that_is_not_there_names_those_that_are(copy: Path) -> None:
    with pytest.raises(DatasetError, match=r"no split 'val', only \['train'\]"):
        RldsSource(copy, split="val")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda t: t.numbers("proprio"), r"no step feature 'proprio'; it has \['action'"),
        (lambda t: t.numbers("language_instruction"), "holds no numbers"),
        (lambda t: t.pictures("action"), "holds no pictures"),
        (lambda t: t.texts("action"), "holds no text"),
    ],
)
def test_a_feature_that_is_asked_for_by_a_wrong_name_or_kind(read: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(RldsSource(WRITTEN).trajectory(0))  # type: ignore[operator]
