"""openpi's pi0 that predicts actions relative to the state: the import records it, act and training heed it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import draccus
import numpy as np
import pytest
import yaml

from ipvla.data.plan import PlanPosition
from ipvla.data.rlds import write_rlds
from ipvla.experiment import ExperimentConfig
from ipvla.policy import Policy
from ipvla.training.parallel import World
from ipvla.types import Observation
from ray_jobs.import_policy import ImportConfig, main
from ray_jobs.importing.pi import PiConfig
from tests.checkpoints.test_pi import HERE, openpi_layout
from tests.synthetic import SIZE, cue_episode

SIX = (True,) * 6


def imported(source: Path, directory: Path, relative: tuple[bool, ...]) -> Policy:
    pi = PiConfig(str(HERE / "tokenizer"), execute=5, vision_heads=3, relative_actions=relative)
    terms = {"gripper": "environment"}
    main(ImportConfig(source, directory, dtype="float32", cameras=("agentview",), terms=terms, pi=pi))
    return Policy.load(directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openpi_layout(tmp_path_factory.mktemp("openpi") / "pi0", "pi0")


def test_playing_adds_the_state_to_the_numbers_that_are_relative(source: Path, tmp_path: Path) -> None:
    plain, six = imported(source, tmp_path / "plain", ()), imported(source, tmp_path / "six", SIX)
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 8)).astype(np.float32)
    pictures = rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    seen = [Observation({"agentview": pictures[i]}, states[i], "press", 0, f"episode {i}") for i in range(2)]
    absolute, _ = plain.act(seen, plain.initial_memory(2))
    played, _ = six.act(seen, six.initial_memory(2))
    np.testing.assert_allclose(played[..., :6], absolute[..., :6] + states[:, None, :6], atol=1e-5)
    np.testing.assert_array_equal(played[..., 6], absolute[..., 6])
    assert "relative_actions" in (tmp_path / "six" / "policy.json").read_text()
    assert "relative_actions" not in (tmp_path / "plain" / "policy.json").read_text()


def test_training_learns_differences_from_the_state(source: Path, tmp_path: Path) -> None:
    policy = imported(source, tmp_path / "six", SIX)
    rng = np.random.default_rng(1)
    episodes = [cue_episode(seed) for seed in range(4)]
    moved = [replace(e, state=rng.normal(size=e.state.shape).astype(np.float32)) for e in episodes]
    write_rlds(tmp_path / "datasets", "cue", moved, SIZE)
    settings = yaml.safe_load((tmp_path / "six.train.yaml").read_text())
    settings["storage_root"] = str(tmp_path)
    settings["data"]["dataset"] = "cue"
    settings["lanes"] |= {"lanes": 2, "window": 2}
    settings["model"]["lora"] = {"rank": 4}
    settings["training"] = {"steps": 1, "precision": "fp32"}
    config = draccus.decode(ExperimentConfig, settings)
    experiment, dataset = config.build(World()), config.open_dataset()
    assert experiment.policy.transforms.conventions.relative_actions == SIX
    _, batch = next(iter(experiment.lanes.batches(PlanPosition())))
    compared = 0
    for lane, step in zip(*np.nonzero(batch.valid.numpy()), strict=True):
        index, t = int(batch.episode_key[lane, step]), int(batch.t[lane, step])
        if index < 0:
            continue
        episode, count = dataset.episode(index), int(batch.action_valid[lane, step].sum())
        done = episode.action[t : t + count].copy()
        done[:, :6] -= episode.state[t, :6]
        expected = policy.transforms.statistics.action.normalise(done, policy.transforms.conventions.normalisation)
        np.testing.assert_allclose(batch.actions[lane, step, :count], expected, atol=1e-5)
        compared += count
    assert compared > 10


def test_lerobots_layout_tells_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pi\.relative_actions is set, and .*pi0 is in none of openpi's layouts"):
        imported(HERE / "pi0", tmp_path / "policy", SIX)
    assert not (tmp_path / "policy").exists()


def test_more_numbers_than_the_state_has_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative_actions has 9 values for actions of 7 numbers"):
        imported(source, tmp_path / "policy", (True,) * 9)
