"""An imported OpenVLA-OFT answers what its public code answered, with and without FiLM."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.models.heads import OpenVLATokensConfig
from ipvla.models.memory import MemoryConfig, PromptMemoryConfig
from ipvla.policy import Policy
from ipvla.types import Observation, StepBatch
from ray_jobs.import_policy import ImportConfig, ImportedModelConfig, imported, main
from tests.checkpoints.conftest import HERE, close, golden, golden_json, pictures

CASES = golden_json("oft")["cases"]
CAMERAS = ("agentview", "robot0_eye_in_hand")


def observation(case: int, cameras: tuple[str, ...] = CAMERAS) -> Observation:
    described = CASES[case]
    views = {camera: pictures()[name] for camera, name in zip(cameras, described["images"], strict=False)}
    return Observation(views, np.array(described["state"], np.float32), described["task"], 0)


@pytest.fixture(scope="module")
def policy(oft: Path, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """As it comes out of its directory again."""
    directory = tmp_path_factory.mktemp("policies") / "oft"
    main(ImportConfig(oft, directory, cameras=CAMERAS))
    return Policy.load(directory)


def answered(policy: Policy, case: int) -> tuple[np.ndarray, Observation]:
    seen = observation(case, policy.transforms.cameras)
    return policy.act([seen], policy.initial_memory(1))[0][0], seen


def same_actions(ours: np.ndarray, theirs: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(ours[:, :6], theirs[:, :6], rtol=0, atol=atol)
    np.testing.assert_array_equal(ours[:, 6], np.where(theirs[:, 6] < 0.5, 1, -1))


@pytest.mark.parametrize("case", [0, 1])
def test_a_chunk_from_two_pictures_and_the_state(policy: Policy, case: int) -> None:
    expected = {
        name.partition(":")[2]: x for name, x in golden("oft_predict").items() if name.startswith(f"l1_{case}:")
    }
    actions, seen = answered(policy, case)
    same_actions(actions, expected["actions"], 1e-5)
    inputs = policy.transforms.inputs([seen])
    close(inputs.proprio[0], expected["proprio_normalised"], 1e-6)
    output = policy.model.backbone(inputs)
    close(output.hidden_states[0], expected["inputs_embeds"])
    for i, hidden in enumerate(output.hidden_states):
        close(hidden, expected[f"hidden_{i}"])
    close(policy.model.head.sample(output.features)[0], expected["normalised_actions"][0], 1e-5)


def test_rows_of_other_lengths_do_not_matter(policy: Policy) -> None:
    both = policy.act([observation(0), observation(1)], policy.initial_memory(2))[0]
    for case in (0, 1):
        np.testing.assert_allclose(both[case], answered(policy, case)[0], atol=1e-5)


def test_the_l1_loss_and_its_gradients(policy: Policy) -> None:
    expected, model = golden("oft_train_step"), policy.model
    inputs = policy.transforms.inputs([observation(0), observation(1)])
    inputs = replace(inputs, proprio=torch.from_numpy(expected["proprio"])).map(lambda x: x[None])
    yes, zero = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    nothing = torch.zeros(1, 2, 0, dtype=torch.long)
    actions = torch.from_numpy(expected["actions"])[None]
    valid = torch.ones(1, 2, 8, dtype=torch.bool)
    batch = StepBatch(inputs, actions, valid, yes, yes, zero, zero, zero, nothing, nothing, nothing, nothing)
    model.zero_grad()
    loss, _ = model.loss(batch, {})
    close(loss, expected["l1_loss"], 1e-5)
    loss.backward()
    named = dict(model.named_parameters())
    names = {
        "projector.fc3.weight": "backbone.vlm.projector.fc3.weight",
        "action_head.model.fc1.weight": "head.model.fc1.weight",
        "proprio_projector.fc1.weight": "backbone.vlm.proprio_projector.fc1.weight",
        "q_proj_0": "backbone.vlm.language_model.model.layers.0.self_attn.q_proj.weight",
    }
    for theirs, ours in names.items():
        gradient = expected[f"grad:{theirs}"]
        close(named[ours].grad, gradient, 1e-5 * float(np.abs(gradient).max()))


def test_words_all_at_once_where_there_is_no_head(oft: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(oft, source, ignore=shutil.ignore_patterns("*.pt"))
    made = ImportConfig(source, tmp_path / "p", cameras=CAMERAS, parallel=True)
    policy = imported(made)
    assert isinstance(policy.config.head, OpenVLATokensConfig)
    for case in (0, 1):
        same_actions(answered(policy, case)[0], golden("oft_predict")[f"discrete_{case}:actions"], 1e-6)


def test_one_picture_without_the_state(oft: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(oft, source, ignore=shutil.ignore_patterns("proprio*.pt"))
    policy = imported(ImportConfig(source, tmp_path / "p", cameras=CAMERAS[:1]))
    for case in (0, 1):
        expected = golden("oft_predict")[f"l1_one_image_no_proprio_{case}:actions"]
        same_actions(answered(policy, case)[0], expected, 1e-5)


def test_terms_that_the_files_do_not_tell(oft: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(oft, source, ignore=shutil.ignore_patterns("proprio*.pt"))
    config = ImportConfig(source, tmp_path / "p", cameras=CAMERAS[:1])
    by_quantiles, by_bounds = (imported(c) for c in (config, replace(config, normalisation="bounds")))
    action = by_quantiles.transforms.statistics.action
    a, b = (answered(policy, 0)[0] for policy in (by_quantiles, by_bounds))
    said = (a - action.q01) / (action.q99 - action.q01)
    np.testing.assert_allclose(b[:, :6], (said * (action.max - action.min) + action.min)[:, :6], atol=1e-5)
    with pytest.raises(ValueError, match="must be at least 1"):
        replace(config, chunk=0)
    with pytest.raises(ValueError, match="choose one of bounds_q99"):
        replace(config, normalisation="none")  # type: ignore[arg-type]


def test_it_writes_no_words(policy: Policy, oft: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="writes no words"):
        policy.model.backbone.write(policy.transforms.inputs([observation(0)]), 3)
    with pytest.raises(ValueError, match="OpenVLA-OFT writes no words"):
        imported(ImportConfig(oft, tmp_path / "p", model=ImportedModelConfig(PromptMemoryConfig())))


@pytest.mark.parametrize("name", ["bank", "gru", "kv", "latent"])
def test_with_a_memory(oft: Path, tmp_path: Path, name: str) -> None:
    """Those that begin closed answer bit for bit as without; the others do not."""
    memory = MemoryConfig.get_choice_class(name)()
    plain = imported(ImportConfig(oft, tmp_path / "p", cameras=CAMERAS))
    made = imported(ImportConfig(oft, tmp_path / "p", cameras=CAMERAS, model=ImportedModelConfig(memory)))
    state, same = made.initial_memory(1), []
    for t in range(3):
        seen = replace(observation(t % 2), t=8 * t)
        answer, state = made.act([seen], state)
        same.append(np.array_equal(answer[0], plain.act([seen], {})[0][0]))
    assert all(same) == (name in ("bank", "gru"))


def test_film(oft_film: Path, tmp_path: Path) -> None:
    expected = golden("oft_film")
    main(
        ImportConfig(
            oft_film, tmp_path / "film", cameras=CAMERAS, lora_alpha=golden_json("oft")["film_lora_alpha"]
        )
    )
    policy = Policy.load(tmp_path / "film")
    actions, seen = answered(policy, 0)
    close(policy.model.backbone(policy.transforms.inputs([seen])).features.perception, expected["patch_features"])
    same_actions(actions, expected["actions"], 1e-4)


def test_film_needs_its_own_scale(oft_film: Path, tmp_path: Path) -> None:
    """The file does not tell alpha: with OFT's rule another answer comes out, which is why it can be given."""
    policy = imported(ImportConfig(oft_film, tmp_path / "p", cameras=CAMERAS))
    assert not np.allclose(answered(policy, 0)[0][:, :6], golden("oft_film")["actions"][:, :6], atol=1e-3)
    assert (HERE / "oft").is_dir()
