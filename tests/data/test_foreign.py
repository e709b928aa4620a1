"""Datasets that other programs wrote: recognised, or refused with what to set."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.rlds import write_rlds
from ipvla.data.rlds.source import RldsSource
from ipvla.data.source import BrokenEpisodeError, DatasetError
from ipvla.data.sources import dataset_location
from ipvla.data.standards import StandardConfig
from ipvla.data.standards.libero import Libero, Recorded
from ipvla.data.standards.open_x import Droid
from ipvla.data.standards.registry import standard_for
from ipvla.experiment import DataConfig, ExperimentConfig
from ray_jobs.command_line.settings import parse
from tests.data.conftest import SIZE, random_episode
from tests.data.foreign import LENGTHS, no_picture, not_a_number, other_words, write_foreign
from tests.data.standards import trajectories

PUBLISHED = {
    "libero_spatial_no_noops": "libero_spatial",
    "libero_object_no_noops": "libero_object",
    "libero_goal_no_noops": "libero_goal",
    "libero_10_no_noops": "liber_o10",
}


@pytest.mark.parametrize(("name", "inner"), PUBLISHED.items())
def test_published_libero_is_known_by_its_directory_and_by_its_inner_name(
    tmp_path: Path, name: str, inner: str
) -> None:
    directory = write_foreign(tmp_path / name / "1.0.0", inner_name=inner)
    dataset = open_dataset(dataset_location(tmp_path, name))
    assert (dataset.name, type(dataset.standard)) == (name, Libero)
    gripper = dataset.statistics().action
    assert (gripper.min[-1], gripper.max[-1]) == (0, 1), "1 is open, as OpenVLA's statistics have it"
    elsewhere = open_dataset(shutil.copytree(directory, tmp_path / "mine" / "1.0.0"))
    assert (elsewhere.name, type(elsewhere.standard)) == ("mine", Libero)


def test_published_libero_can_be_padded_and_mixed(tmp_path: Path) -> None:
    for name, inner in PUBLISHED.items():
        write_foreign(tmp_path / name / "1.0.0", inner_name=inner)
    mixed = DataConfig(dataset="libero_4_task_suites_no_noops", padded_state=True).build(tmp_path)
    assert set(mixed.mixed()) == set(PUBLISHED)
    assert mixed.episode(0).state.shape[1] == 9


def test_droid_is_known_by_both_names() -> None:
    features = trajectories.features(trajectories.droid(3))
    assert isinstance(standard_for("droid_100", features, "r2d2_faceblur"), Droid)
    assert isinstance(standard_for("mine", features, "r2d2_faceblur"), Droid)


def test_our_own_dataset_of_a_suites_name_stays_as_it_was_recorded(tmp_path: Path) -> None:
    dataset = open_dataset(write_rlds(tmp_path, "libero_spatial", [random_episode(0, 5)], SIZE))
    assert isinstance(dataset.standard, Recorded)


@pytest.mark.parametrize("shape", [(14,), (), (2, 7)])
def test_other_actions_under_liberos_names_are_no_hand_but_can_be_configured(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    directory = write_foreign(tmp_path / "arms" / "1.0.0", action_shape=shape)
    with pytest.raises(
        DatasetError, match=r"action \[.*\].* Configure its standard, .*--data\.standard\.cam"
    ) as caught:
        open_dataset(directory)
    flags = str(caught.value).partition("for example: ")[2].partition(" (`")[0]
    standard = parse(ExperimentConfig, shlex.split(flags)).data.standard
    assert standard is not None
    if shape:
        dataset = open_dataset(directory, standard=standard)
        assert dataset.episode(0).action.shape == (LENGTHS[0], int(np.prod(shape)))
        assert dataset.standard.gripper == "none"


@pytest.mark.parametrize("skip", [False, True])
def test_episodes_that_the_survey_finds_broken_are_told_or_left_out(
    tmp_path: Path, skip: bool, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_foreign(tmp_path / "nan" / "1.0.0", change=not_a_number)
    dataset = open_dataset(directory, skip_bad_episodes=skip)
    assert dataset.statistics().num_trajectories == 2
    if not skip:
        with pytest.raises(
            BrokenEpisodeError, match=r"1 of the 3 episodes of .*: .*not finite.*skip_bad_episodes"
        ):
            dataset.require_readable()
        return
    dataset.require_readable()
    assert (dataset.broken, dataset.lengths.tolist()) == (1, [LENGTHS[0], LENGTHS[2]])
    assert "1 episodes are left out" in caplog.text


def test_a_dataset_that_was_repaired_is_surveyed_anew(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "some" / "1.0.0", change=not_a_number)
    with pytest.raises(BrokenEpisodeError, match="not finite"):
        open_dataset(directory, read_root=tmp_path / "cache").require_readable()
    shutil.rmtree(directory)
    write_foreign(directory)
    dataset = open_dataset(directory, read_root=tmp_path / "cache")
    dataset.require_readable()
    assert dataset.statistics().num_trajectories == 3


def test_words_that_change_within_an_episode_are_counted(tmp_path: Path) -> None:
    dataset = open_dataset(write_foreign(tmp_path / "words" / "1.0.0", change=other_words))
    dataset.statistics()
    assert dataset.reworded == 2
    assert dataset.instructions() == {"open the drawer"}
    assert dataset.episode(0).wordings == ("close it again",)
    assert dataset.episode(2).wordings == ()


def _with_statistics(tmp_path: Path, **changes: object) -> EpisodeDataset:
    directory = write_rlds(tmp_path, "some", [random_episode(0, 6), random_episode(1, 9)], SIZE)
    path = directory / "dataset_statistics.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({"some": written["some"] | changes} if "mean" not in changes else changes))
    return open_dataset(directory)


def test_statistics_that_belong_to_the_episodes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipvla.data.dataset.surveyed", lambda *_: pytest.fail("the episodes were read"))
    assert _with_statistics(tmp_path).statistics().num_transitions == 15


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_transitions": 99_999}, "counts 2 episodes of 99999 steps, and there are 2 of 15"),
        ({"num_trajectories": 3}, "counts 3 episodes"),
        ({"mean": [0.0] * 7, "std": [1.0] * 7}, "holds mean, std of one feature, not the statistics of a dataset"),
        (
            {"proprio": {row: [9.0] * 9 for row in ("mean", "std", "min", "max", "q01", "q99")}},
            "is of 9 numbers of proprioception, not of 8",
        ),
    ],
)
def test_statistics_of_other_data_are_computed_anew(
    tmp_path: Path, changes: dict[str, object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        statistics = _with_statistics(tmp_path, **changes).statistics()
    assert (statistics.num_transitions, statistics.num_trajectories, statistics.proprio.dim) == (15, 2, 8)
    assert abs(statistics.proprio.mean).max() < 9
    assert why in caplog.text


def test_depth_is_no_camera(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "depth" / "1.0.0", depth=True)
    assert RldsSource(directory).features["observation/depth"].is_depth
    assert open_dataset(directory).cameras == ("agentview", "robot0_eye_in_hand")
    with pytest.raises(DatasetError, match=r"'observation/depth' holds depth \(uint16\)"):
        open_dataset(directory, standard=StandardConfig({"depth": "observation/depth"}))


def test_a_partly_given_standard_begins_with_the_formats_names(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "some" / "1.0.0")
    dataset = open_dataset(directory, standard=StandardConfig(gripper="none"))
    assert dataset.cameras == ("image", "wrist_image")
    assert dataset.episode(0).instruction == "open the drawer"


def test_a_seed_that_is_no_number_is_none(tmp_path: Path) -> None:
    assert open_dataset(write_foreign(tmp_path / "some" / "1.0.0", seed="run-7")).episode(0).seed == -1


def test_a_feature_of_any_length_within_steps_is_named(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "some" / "1.0.0")
    path = directory / "features.json"
    features = json.loads(path.read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    joints = steps["observation"]["featuresDict"]["features"]["joint_state"]
    joints["tensor"]["shape"]["dimensions"] = ["-1"]
    path.write_text(json.dumps(features))
    with pytest.raises(BrokenEpisodeError, match=r"observation/joint_state may be of any length"):
        open_dataset(directory)


def test_pointers_of_git_are_named(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "some" / "1.0.0")
    (shard,) = directory.glob("*.array_record*")
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(DatasetError, match=rf"{shard.name} cannot be read: .*Git LFS.*git lfs pull"):
        open_dataset(directory)


def test_metadata_of_a_newer_writer_and_without_features_are_named(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "some" / "1.0.0")
    info = directory / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"laterField": 1}))
    with pytest.raises(DatasetError, match=r"field 'laterField' that tensorflow-datasets .* a newer one wrote"):
        open_dataset(directory)
    (directory / "features.json").unlink()
    with pytest.raises(DatasetError, match=r"holds no features\.json"):
        open_dataset(directory)


def test_other_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no split 'train', only \['val'\]"):
        open_dataset(write_foreign(tmp_path / "some" / "1.0.0", split="val"))


def test_copies_and_unfinished_builds_are_no_versions(tmp_path: Path) -> None:
    version = write_foreign(tmp_path / "some" / "1.0.0")
    for other in ("1.0.0_v2_bad", "1.0.0.incompleteA9Z31B", "backup"):
        shutil.copytree(version, tmp_path / "some" / other)
    assert dataset_location(tmp_path, "some") == str(version)
    with pytest.raises(DatasetError, match=f"did you mean {version}"):
        open_dataset(tmp_path / "some")
    shutil.rmtree(version)
    with pytest.raises(DatasetError, match=r"it has .*backup.*three numbers"):
        open_dataset(tmp_path / "some")


def test_versions_are_found_one_level_up_and_down(tmp_path: Path) -> None:
    version = write_foreign(tmp_path / "flat")
    assert dataset_location(tmp_path, "flat") == str(version)
    configured = shutil.copytree(version, tmp_path / "with_config" / "full" / "1.0.0")
    assert dataset_location(tmp_path, "with_config") == str(configured)
    shutil.copytree(version, tmp_path / "with_config" / "small" / "1.0.0")
    with pytest.raises(DatasetError, match=r"several configurations; .*full/1\.0\.0, .*small/1\.0\.0"):
        dataset_location(tmp_path, "with_config")
    (configured / "train").mkdir()
    with pytest.raises(DatasetError, match=f"did you mean {configured}"):
        open_dataset(configured / "train")
    with pytest.raises(DatasetError, match=r"does not exist; .*beside it there is 1\.0\.0"):
        open_dataset(configured.parent / "2.0.0")


def test_a_picture_that_is_none_breaks_its_frames_alone(tmp_path: Path) -> None:
    dataset = open_dataset(write_foreign(tmp_path / "some" / "1.0.0", change=no_picture), skip_bad_episodes=True)
    assert dataset.broken == 0
    with pytest.raises(BrokenEpisodeError, match="cannot be decoded"):
        dataset.frame(1, 0, "agentview")
    dataset.frame(2, 0, "agentview")
