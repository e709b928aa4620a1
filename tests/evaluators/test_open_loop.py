"""A policy beside recorded actions: what is compared with what, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evaluators.open_loop import EpisodeTrack, measure, open_loop, track
from ipvla.contract import ContractError
from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.experiment import ExperimentConfig
from ipvla.policy import CheckpointError, Policy
from ipvla.training.parallel import World
from ray_jobs.open_loop import OpenLoopConfig
from ray_jobs.open_loop import measure as run_job

Make = Callable[..., ExperimentConfig]


@pytest.fixture
def policy(make_experiment: Make) -> Policy:
    return make_experiment().build(World()).policy


@pytest.fixture
def dataset(storage_root: Path) -> EpisodeDataset:
    return open_dataset(storage_root / "datasets" / "cue" / "1.0.0")


def tracks(seed: int, error: float, every: int) -> list[EpisodeTrack]:
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(1, 20, 3):
        recorded = rng.normal(size=(length, 3)).astype(np.float32)
        ahead = np.where(np.arange(length)[:, None] < every, np.nan, recorded)
        made.append(EpisodeTrack(recorded, recorded + np.float32(error), ahead))
    return made


@given(st.integers(0, 99), st.floats(-2, 2), st.integers(1, 8))
def test_the_error_is_the_mean_distance(seed: int, error: float, every: int) -> None:
    found = measure(tracks(seed, error, every), every)
    np.testing.assert_allclose(found.played, abs(error), atol=1e-5)
    assert np.isnan(found.ahead).all() or np.allclose(found.ahead, 0)


def test_a_perfect_policy_and_one_that_holds_still() -> None:
    recorded = np.cumsum(np.ones((12, 2), np.float32), 0)
    nothing = np.full_like(recorded, np.nan)
    perfect = measure([EpisodeTrack(recorded, recorded, nothing)], 4)
    np.testing.assert_allclose(perfect.correlation, 1)
    assert perfect.no_better == ()
    assert perfect.to_dict()["ahead"] == [None, None]
    # the action before each chunk of 4 is 1, 2, 3 and 4 below; in the first chunk it is that chunk's own first
    np.testing.assert_allclose(perfect.held, (0 + 1 + 2 + 3 + 2 * (1 + 2 + 3 + 4)) / 12)
    constant = measure([EpisodeTrack(recorded, np.zeros_like(recorded), nothing)], 4)
    assert constant.no_better == (0, 1)
    assert np.isnan(constant.correlation).all()


def test_the_policy_sees_an_episode_in_order_with_its_memory(policy: Policy, dataset: EpisodeDataset) -> None:
    found = track(policy, dataset, 1)
    memory, length = policy.initial_memory(1), int(dataset.lengths[1])
    for t in range(0, length, policy.execute):
        chunks, memory = policy.act([dataset.observation(1, t, policy.transforms.cameras)], memory)
        played = chunks[0][: policy.execute][: length - t]
        np.testing.assert_array_equal(found.played[t : t + len(played)], played)
    np.testing.assert_allclose(found.recorded, dataset.episode(1).action)
    assert np.isnan(found.ahead[: policy.execute]).all()


def test_a_policy_of_other_data_is_refused(policy: Policy, dataset: EpisodeDataset) -> None:
    conventions = replace(policy.transforms.conventions, cameras=("chin",))
    other = replace(policy, transforms=replace(policy.transforms, conventions=conventions))
    with pytest.raises(ContractError, match=r"chin.*lacks chin"):
        open_loop(other, dataset, [0])


def test_the_job_writes_beside_the_policy(make_experiment: Make, policy: Policy, tmp_path: Path) -> None:
    experiment = make_experiment()
    policy.save(tmp_path / "run" / "policy")
    config = OpenLoopConfig(
        storage_root=experiment.storage_root,
        dataset=experiment.data.dataset,
        policy=tmp_path / "run" / "policy",
        episodes=2,
    )
    found, picture = run_job(config, Console(quiet=True))
    assert found.played[0] > 0, "the one number that varies, of a policy that learned nothing"
    assert found.no_better == (0,)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "open_loop.json").exists()
    with pytest.raises(CheckpointError, match="no policy in"):
        run_job(replace(config, policy=tmp_path / "none"), Console(quiet=True))


@pytest.mark.parametrize(
    ("given", "reason"), [({}, "one of them"), ({"name": "x", "episodes": 0}, "episodes is 0")]
)
def test_settings_that_cannot_be(given: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        OpenLoopConfig(**given)  # type: ignore[arg-type]
