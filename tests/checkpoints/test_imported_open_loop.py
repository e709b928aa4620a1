"""`ipvla open_loop` of policies that were imported: their actions beside recorded ones, in the same units."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ipvla.contract import ContractError
from ipvla.data.rlds import write_rlds
from ipvla.policy import Policy
from ray_jobs.import_policy import ImportConfig, main
from ray_jobs.importing.pi import PiConfig
from ray_jobs.open_loop import OpenLoopConfig, measure
from tests.checkpoints.conftest import openvla
from tests.synthetic import SIZE, cue_episode

__all__ = ["openvla"]
PI = Path(__file__).parent / "pi"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes, whose gripper closes half way; recorded as the simulator has it, +1 closed."""
    root = tmp_path_factory.mktemp("storage")
    episodes = []
    for seed in range(4):
        episode = cue_episode(seed)
        action = episode.action.copy()
        action[:, 6] = np.where(np.arange(len(action)) < len(action) // 2, -1, 1)
        episodes.append(replace(episode, action=action))
    write_rlds(root / "datasets", "cue", episodes, SIZE)
    return root


def imported(kind: str, openvla: Path, directory: Path, cameras: tuple[str, ...] = ("agentview",)) -> Path:
    if kind == "openvla":
        main(ImportConfig(openvla, directory, "toy_libero_no_noops", cameras=cameras))
    else:
        pi = PiConfig(str(PI / "tokenizer"), execute=5, vision_heads=3)
        terms = {"gripper": "environment"}
        main(ImportConfig(PI / "pi0", directory, dtype="float32", cameras=cameras, terms=terms, pi=pi))
    return directory


@pytest.mark.parametrize(("kind", "execute"), [("openvla", 1), ("pi0", 5)])
def test_errors_are_of_what_the_policy_would_have_played(
    kind: str, execute: int, openvla: Path, storage: Path, tmp_path: Path
) -> None:
    directory = imported(kind, openvla, tmp_path / kind / "policy")
    config = OpenLoopConfig(storage_root=storage, dataset="cue", policy=directory, episodes=2)
    found, picture = measure(config, Console(quiet=True))
    policy, dataset, errors = Policy.load(directory), config.open_dataset(), []
    written = json.loads((directory.parent / "open_loop.json").read_text())
    assert written["execute"] == execute
    assert picture.is_file()
    for index in written["episodes"]:
        recorded = dataset.episode(index).action
        assert set(recorded[:, 6]) == {-1, 1}
        memory = policy.initial_memory(1)
        for t in range(0, len(recorded), execute):
            chunks, memory = policy.act([dataset.observation(index, t, policy.transforms.cameras)], memory)
            errors.append(np.abs(chunks[0][:execute][: len(recorded) - t] - recorded[t : t + execute]))
    np.testing.assert_allclose(found.played, np.concatenate(errors).mean(0), atol=1e-6)
    assert found.spread[6] == pytest.approx(1, abs=0.1), (
        "half of the actions close the gripper, whose kind is ours"
    )
    assert set(np.round(np.concatenate(errors)[:, 6])) <= {0, 2}


def test_cameras_that_the_dataset_lacks_are_named(openvla: Path, storage: Path, tmp_path: Path) -> None:
    directory = imported("pi0", openvla, tmp_path / "pi0" / "policy", cameras=())
    config = OpenLoopConfig(storage_root=storage, dataset="cue", policy=directory)
    with pytest.raises(ContractError, match=r"looks through base_0_rgb, .* dataset cue shows agentview"):
        measure(config, Console(quiet=True))
