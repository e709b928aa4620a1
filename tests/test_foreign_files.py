"""Files of other kinds in the place of every kind that is read: named, with what helps, in one line."""

from __future__ import annotations

import gzip
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks.reliability_loaders import LOADERS
from benchmarks.rollout_speed import save_untrained_policy
from ipvla.data.dataset import open_dataset
from ipvla.data.source import DatasetError
from ipvla.policy import CheckpointError, Policy
from ray_jobs.import_policy import ImportConfig, imported

#: What is there instead -> how it begins, and what the refusal says.
KINDS = {
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "gzip": (gzip.compress(b"{}", mtime=0), "gunzip"),
    "torch.save": (b"PK\x03\x04" + bytes(60), "ZIP archive"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "pickle"),
    "web page": (b"<!DOCTYPE html>\n<html><title>Log in</title></html>", "web page"),
    "nothing": (b"", ""),
}
#: Lists of episodes are made anew: tests/data/rlds/test_index.py.
DOORS = sorted(name for name in LOADERS if "index" not in name.split(".")[0])


@pytest.fixture(scope="session")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The good file of a door, made once."""
    return cache(lambda door: LOADERS[door].make(tmp_path_factory.mktemp("door")))


def refusal(door: str, path: Path) -> str:
    loader = LOADERS[door]
    with pytest.raises(loader.promised) as caught:
        loader.load(path)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1000
    assert path.name in said or str(path.parent) in said, said
    return said


@pytest.mark.parametrize("door", DOORS)
def test_another_kind_of_file_is_named_with_what_helps(door: str, place_of: Callable[[str], Path]) -> None:
    path = place_of(door)
    content = path.read_bytes()
    try:
        for kind, (foreign, helps) in KINDS.items():
            if (door, kind) == ("settings", "nothing"):
                continue  # which sets nothing
            path.write_bytes(foreign)
            assert helps in refusal(door, path), kind
        path.write_bytes(gzip.compress(content))
        assert "gunzip" in refusal(door, path)
        path.unlink()
        path.mkdir()
        refusal(door, path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        path.write_bytes(content)
    LOADERS[door].load(path)


def test_a_policys_directory_one_level_up_and_down_is_found(tmp_path: Path) -> None:
    policy = save_untrained_policy(tmp_path / "run" / "policy")
    for wrong in (policy.parent, policy / "backbone"):
        wrong.mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=f"did you mean {policy}\\?"):
            Policy.load(wrong)


def test_an_adapter_in_a_policys_or_a_models_place_is_named(tmp_path: Path) -> None:
    adapter = LOADERS["import adapter's adapter_config.json"].make(tmp_path).parent
    with pytest.raises(CheckpointError, match=r"holds an adapter of PEFT: .*ipvla import --source BASE --adapter"):
        Policy.load(adapter)
    with pytest.raises(CheckpointError, match=r"holds a published model: .*ipvla import --source"):
        Policy.load(tmp_path / "model")
    with pytest.raises(ValueError, match="there is an adapter of PEFT: give its base as --source"):
        imported(ImportConfig(adapter, tmp_path / "new"))
    (tmp_path / "model" / "weights").mkdir()
    with pytest.raises(ValueError, match=f"did you mean {tmp_path / 'model'}\\?"):
        imported(ImportConfig(tmp_path / "model" / "weights", tmp_path / "new"))


@pytest.mark.parametrize("door", ["FAST tokenizer.json", "RVQ config.json", "artifact's record"])
def test_token_files_and_artifacts_one_level_up_are_found(door: str, tmp_path: Path) -> None:
    made = LOADERS[door].make(tmp_path / "some")
    with pytest.raises(LOADERS[door].promised, match=f"did you mean {made.parent}\\?"):
        LOADERS[door].load(tmp_path / made.name)


def test_a_lerobot_dataset_one_level_up_and_down_is_found(tmp_path: Path) -> None:
    LOADERS["LeRobot meta/info.json"].make(tmp_path)
    for wrong in (tmp_path, tmp_path / "some" / "meta"):
        with pytest.raises(DatasetError, match=f"did you mean the LeRobotDataset {tmp_path / 'some'}\\?"):
            open_dataset(wrong)
