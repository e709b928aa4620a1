"""What a dataset leaves out of its source, and whom it tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ipvla.data.dataset import open_dataset
from ipvla.data.rlds import write_rlds
from ipvla.data.source import BrokenEpisodeError, DatasetError
from ipvla.data.sources import dataset_location
from ipvla.data.standards import StandardConfig
from tests.data.conftest import SIZE, random_episode

LENGTHS = (6, 1, 9)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    episodes = [random_episode(seed, length) for seed, length in enumerate(LENGTHS)]
    return write_rlds(tmp_path, "some", [*episodes, replace(random_episode(3, 5), instruction="")], SIZE)


def standard(**settings: object) -> StandardConfig:
    return StandardConfig({"agentview": "observation/image"}, **settings)  # type: ignore[arg-type]


def test_an_episode_that_a_standard_leaves_nothing_of_is_told_or_skipped(directory: Path) -> None:
    with pytest.raises(BrokenEpisodeError, match=r"of episode 1's 1 steps .* none; set skip_bad_episodes"):
        open_dataset(directory, standard=standard(trimmed=(1, 0)))
    dataset = open_dataset(directory, standard=standard(trimmed=(1, 0)), skip_bad_episodes=True)
    assert (dataset.lengths.tolist(), dataset.broken) == ([5, 8, 4], 1)
    np.testing.assert_array_equal(dataset.episode(1).action, random_episode(2, 9).action[1:])


def test_trimmed_pictures_stay_with_their_steps(directory: Path) -> None:
    whole = open_dataset(directory)
    dataset = open_dataset(directory, standard=standard(trimmed=(2, 1)), skip_bad_episodes=True)
    assert dataset.episode(0).raw_step.tolist() == [2, 3, 4]
    np.testing.assert_array_equal(dataset.frame(0, 1, "agentview"), whole.frame(0, 3, "agentview"))
    np.testing.assert_array_equal(dataset.observation(0, 1, ()).proprio, whole.observation(0, 3, ()).proprio)


def test_episodes_without_a_task_in_words_can_be_left_out(directory: Path) -> None:
    assert open_dataset(directory).lengths.tolist() == [6, 1, 9, 5]
    dataset = open_dataset(directory, skip_unlabelled=True)
    assert dataset.lengths.tolist() == [6, 1, 9]
    assert dataset.broken == 0


def test_a_standard_that_leaves_nothing_at_all_is_refused(directory: Path) -> None:
    with pytest.raises(DatasetError, match="leaves no episode; correct it"):
        open_dataset(directory, standard=standard(trimmed=(9, 9)), skip_bad_episodes=True)


def test_the_newest_version_of_a_name_is_taken(tmp_path: Path) -> None:
    for version in ("1.0.0", "0.9.0", "10.0.1"):
        (tmp_path / "some" / version).mkdir(parents=True)
        (tmp_path / "some" / version / "dataset_info.json").touch()
    assert dataset_location(tmp_path, "some") == str(tmp_path / "some" / "10.0.1")
    assert dataset_location(tmp_path, "none") == str(tmp_path / "none" / "1.0.0")
    assert dataset_location(tmp_path, "gs://bucket/some/1.0.0") == "gs://bucket/some/1.0.0"
