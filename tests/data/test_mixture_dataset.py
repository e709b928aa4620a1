"""Datasets side by side: every episode is its own dataset's, in units of its own statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.conventions import Conventions
from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.lanes import LaneConfig
from ipvla.data.mixture_dataset import MixtureDataset
from ipvla.data.mixtures import Mixture
from ipvla.data.plan import PlanPosition
from ipvla.data.rlds import write_rlds
from ipvla.data.source import DatasetError
from ipvla.data.transforms import Transforms
from ipvla.types import Episode
from tests.data.conftest import SIZE, random_episode

Make = Callable[..., Transforms]


def _written(root: Path, name: str, episodes: list[Episode]) -> EpisodeDataset:
    return open_dataset(write_rlds(root, name, episodes, SIZE))


@pytest.fixture
def near(tmp_path: Path) -> EpisodeDataset:
    return _written(tmp_path, "near", [random_episode(seed, 6) for seed in range(4)])


@pytest.fixture
def far(tmp_path: Path) -> EpisodeDataset:
    """Actions and states ten times as large."""
    episodes = [random_episode(seed, 9) for seed in range(10, 13)]
    return _written(tmp_path, "far", [replace(e, action=10 * e.action, state=10 * e.state) for e in episodes])


def test_episodes_stand_one_dataset_after_another(near: EpisodeDataset, far: EpisodeDataset) -> None:
    mixed = MixtureDataset({"near": near, "far": far})
    assert mixed.lengths.tolist() == [6] * 4 + [9] * 3
    assert mixed.tasks == near.tasks + far.tasks
    assert [mixed.part(index) for index in range(7)] == ["near"] * 4 + ["far"] * 3
    np.testing.assert_array_equal(mixed.episode(5).action, far.episode(1).action)
    seen = mixed.observation(4, 2, ("agentview",))
    np.testing.assert_array_equal(seen.images["agentview"], far.frame(0, 2, "agentview"))


def test_each_step_is_normalised_by_its_own_datasets_statistics(
    near: EpisodeDataset, far: EpisodeDataset, make_transforms: Make
) -> None:
    mixed = MixtureDataset({"near": near, "far": far})
    transforms = make_transforms(near.statistics(), mixed=mixed.mixed())
    lanes = LaneConfig(lanes=2, window=3, stride=1).build(mixed, transforms)
    checked = set()
    for w in range(lanes.plan(PlanPosition()).num_windows):
        batch = lanes.batch(PlanPosition(0, w))
        for place in np.argwhere(batch.valid.numpy()):
            index, t = int(batch.episode_key[tuple(place)]), int(batch.t[tuple(place)])
            own = far if index >= 4 else near
            single = make_transforms(own.statistics())
            recorded = mixed.episode(index)
            targets, _ = single.chunk_targets(recorded.action, t)
            np.testing.assert_array_equal(batch.actions[tuple(place)], targets)
            inputs = single.inputs([mixed.observation(index, t, ("agentview",))])
            torch.testing.assert_close(batch.inputs.proprio[tuple(place)], inputs.proprio[0], rtol=0, atol=0)
            torch.testing.assert_close(batch.inputs.images[tuple(place)], inputs.images[0], rtol=0, atol=0)
            checked.add((index, t))
    assert checked == {(e, t) for e, length in enumerate(mixed.lengths.tolist()) for t in range(length)}


def test_weights_say_how_often_an_episode_is_seen(
    near: EpisodeDataset, far: EpisodeDataset, make_transforms: Make
) -> None:
    mixed = MixtureDataset({"near": near, "far": far}, Mixture({"near": 1.0, "far": 2.0}))
    lanes = LaneConfig(lanes=2, window=3, stride=1).build(mixed, make_transforms(mixed=mixed.mixed()))
    plan = lanes.plan(PlanPosition())
    seen: Counter[tuple[int, int]] = Counter()
    for w in range(plan.num_windows):
        window = plan.window(w)
        active = window.episode >= 0
        seen.update(zip(window.episode[active].tolist(), window.t[active].tolist(), strict=True))
    expected = {(e, t): 1 + (e >= 4) for e, length in enumerate(mixed.lengths.tolist()) for t in range(length)}
    assert seen == expected


def test_a_policy_keeps_the_statistics_of_all_its_datasets(
    near: EpisodeDataset, far: EpisodeDataset, make_transforms: Make
) -> None:
    mixed = MixtureDataset({"near": near, "far": far})
    transforms = make_transforms(mixed=mixed.mixed())
    again = Transforms(Conventions.from_dict(transforms.to_dict()), transforms.prompts)
    ones = np.ones(7, np.float32)
    np.testing.assert_array_equal(again.of("far").denormalise(ones), transforms.of("far").denormalise(ones))
    assert again.of("far").statistics.to_dict() == far.statistics().to_dict()
    with pytest.raises(ValueError, match="'north' is not in the mixture; choose among near, far"):
        again.of("north")


def test_datasets_that_do_not_fit_are_not_mixed(tmp_path: Path, near: EpisodeDataset) -> None:
    episode = random_episode(0, 4)
    smaller = _written(tmp_path, "smaller", [replace(episode, state=episode.state[:, :3])])
    with pytest.raises(DatasetError, match="near 7 and 8, smaller 7 and 3; configure standards"):
        MixtureDataset({"near": near, "smaller": smaller})
    with pytest.raises(DatasetError, match="near 7 and 8, smaller 7 and 3"):
        MixtureDataset({"near": near, "smaller": smaller}, proprio=(0, 3))
    assert len(MixtureDataset({"near": near, "smaller": smaller}, proprio=(0, 2))) == 5


def test_without_proprioception_datasets_of_different_robots_are_mixed(
    tmp_path: Path, near: EpisodeDataset, make_transforms: Make
) -> None:
    episode = random_episode(0, 4)
    smaller = _written(tmp_path, "smaller", [replace(episode, state=episode.state[:, :3])])
    mixed = MixtureDataset({"near": near, "smaller": smaller}, proprio=())
    transforms = make_transforms(near.statistics(), mixed=mixed.mixed(), proprio_index=())
    batch = LaneConfig(lanes=5, window=2, stride=1).build(mixed, transforms).batch(PlanPosition())
    assert batch.inputs.proprio.shape == (5, 2, 0)


def test_a_dataset_may_have_another_name_in_the_mixture(near: EpisodeDataset, far: EpisodeDataset) -> None:
    mixed = MixtureDataset({"/data/near": near, "far": far}, Mixture({"/data/near": 1.0, "far": 1.0}))
    assert mixed.part(0) == "/data/near"
    assert mixed.repeats(0, 0).tolist() == [1] * 7
