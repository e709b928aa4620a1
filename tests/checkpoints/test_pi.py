"""pi0 and pi0.5: tiny checkpoints that LeRobot 0.6.1 wrote, and what it computed from them, stage by stage.

Everything is float32 and random. Prompts and the statistics of one policy are openpi's, at 15a9616.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ipvla.data.normalisation import FeatureStatistics
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones.letterbox import letterboxed
from ipvla.models.features import Features
from ipvla.models.heads.pi0 import Pi0Head, time_embedding
from ipvla.models.memory import BankMemoryConfig, GRUMemoryConfig, KVMemoryConfig, LatentMemoryConfig, MemoryConfig
from ipvla.policy import Policy
from ipvla.types import ModelInputs, Observation
from ray_jobs.importing.pi import Added, PiConfig, from_lerobot, from_openpi
from ray_jobs.importing.to_lerobot import to_lerobot

HERE = Path(__file__).parent / "pi"
SETTINGS = PiConfig(tokenizer=str(HERE / "tokenizer"), vision_heads=3)
ADDED = Added("float32", ("base", "wrist"))  # the third camera is missing


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def golden(variant: str) -> dict[str, torch.Tensor]:
    return load_file(HERE / variant / "golden.safetensors")


@pytest.fixture(scope="module")
def policy(variant: str) -> Policy:
    return from_lerobot(HERE / variant, SETTINGS, ADDED)


@pytest.fixture(scope="module")
def observations(variant: str, golden: dict[str, torch.Tensor]) -> list[Observation]:
    texts = json.loads((HERE / variant / "golden.json").read_text())["raw.task"]
    pictures = {
        name: golden[f"raw.observation.images.{there}_rgb"].permute(0, 2, 3, 1).numpy()
        for there, name in (("base_0", "base"), ("left_wrist_0", "wrist"))
    }
    states = golden["raw.observation.state"].numpy()
    return [
        Observation({name: x[i] for name, x in pictures.items()}, states[i], texts[i], 0, f"episode {i}")
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def inputs(policy: Policy, observations: list[Observation]) -> ModelInputs:
    return policy.transforms.inputs(observations)


@pytest.fixture(scope="module")
def features(policy: Policy, inputs: ModelInputs) -> Features:
    with torch.no_grad():
        return policy.model.backbone(inputs).features


@pytest.fixture
def head(policy: Policy) -> Pi0Head:
    assert isinstance(policy.model.head, Pi0Head)
    return policy.model.head


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=atol)


def rows(
    ours: torch.Tensor, inputs: ModelInputs, theirs: torch.Tensor, pad: torch.Tensor
) -> Iterator[tuple[Any, Any]]:
    """Ours and theirs of each observation's real tokens: they leave room for the missing camera."""
    for i in range(len(ours)):
        yield ours[i, inputs.attention_mask[i, : ours.shape[1]]], theirs[i, pad[i]]


def test_states_and_prompts_are_theirs(inputs: ModelInputs, golden: dict[str, torch.Tensor]) -> None:
    close(inputs.proprio, golden["batch.observation.state"], 1e-6)
    tokens, mask = golden["batch.observation.language.tokens"], golden["batch.observation.language.attention_mask"]
    pictures = 2 * 16
    for i in range(2):
        ids = inputs.input_ids[i, inputs.attention_mask[i]]
        assert ids[pictures:].tolist() == tokens[i, mask[i]].tolist()


def test_heads_that_do_not_divide_the_vision_tower_are_refused(variant: str) -> None:
    """No file says how many there are."""
    with pytest.raises(ValueError, match=r"vision_heads is 16, and the vision tower is 24 wide"):
        from_lerobot(HERE / variant, replace(SETTINGS, vision_heads=None), ADDED)


def test_its_first_answer_is_finite_whatever_pictures_it_takes(policy: Policy) -> None:
    assert policy.require_finite() is policy


def test_pictures_and_embeddings_are_theirs(
    policy: Policy, inputs: ModelInputs, golden: dict[str, torch.Tensor]
) -> None:
    embedded = policy.model.backbone.embed(inputs)
    for i, vision in enumerate(embedded.perception.unflatten(1, (2, 16)).unbind(1)):
        close(vision, golden[f"vision.{i}"], 1e-5)
    for ours, theirs in rows(embedded.tokens, inputs, golden["prefix_embs"], golden["prefix_pad"]):
        close(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ["landscape", "odd", "square_down"])
def test_pictures_keep_their_aspect_as_theirs_do(name: str) -> None:
    pictures = load_file(HERE / "pictures.safetensors")
    close(letterboxed(pictures[f"{name}.input"], 56).permute(0, 2, 3, 1), pictures[f"{name}.lerobot_pi"], 1e-6)
    close(letterboxed(pictures[f"{name}.input"], 56, "corner"), pictures[f"{name}.lerobot_smolvla"], 1e-6)


def test_the_prefix_is_theirs_in_every_layer(
    policy: Policy, inputs: ModelInputs, features: Features, golden: dict[str, torch.Tensor]
) -> None:
    pad = golden["prefix_pad"]
    states = policy.model.backbone(inputs).hidden_states
    for ours, theirs in rows(states[-1], inputs, golden["prefix_out"], pad):
        close(ours, theirs)
    assert features.layers is not None
    for layer in (0, 2):
        for ours_of, name in ((features.layers.keys, "key"), (features.layers.values, "value")):
            for ours, theirs in rows(ours_of[:, layer], inputs, golden[f"cache.{name}.{layer}"][:, 0], pad):
                close(ours, theirs)


def test_time_velocity_and_losses_are_theirs(
    head: Pi0Head, features: Features, variant: str, golden: dict[str, torch.Tensor]
) -> None:
    time = golden["time"]
    close(time_embedding(time, head.config), golden["time_embedding"], 1e-6)
    close(head.velocity(features, golden["x_t"], time), golden["v_t"])
    losses = head.losses(features, golden["batch.action"], golden["noise"], time)
    close(losses, golden["losses"])
    loss = json.loads((HERE / variant / "golden.json").read_text())["loss"]
    assert losses[..., :7].mean().item() == pytest.approx(loss, abs=1e-4)


def test_sampled_chunks_are_theirs_with_the_same_noise(
    policy: Policy, head: Pi0Head, features: Features, golden: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        close(head.flow(features, golden["noise"]), golden["sampled32"])
        chunk = policy.transforms.denormalise(head.sample(features, golden["noise"]))
    close(torch.from_numpy(chunk), golden["sampled"])


def test_each_step_of_the_flow_is_theirs(
    head: Pi0Head, features: Features, golden: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    velocity = head.velocity

    def seen(features: Features, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        steps.append((time, velocity(features, x, time)))
        return steps[-1][1]

    monkeypatch.setattr(head, "velocity", seen)
    head.flow(features, golden["noise"])
    assert len(steps) == 10
    for i, (time, v) in enumerate(steps):
        close(time, golden["euler.time"][i], 1e-6)
        close(v, golden["euler.v"][i])


def test_targets_are_normalised_as_theirs(policy: Policy, golden: dict[str, torch.Tensor]) -> None:
    sampled = golden["sampled"].numpy()
    again = policy.transforms.conventions.statistics.action.normalise(
        sampled, policy.transforms.conventions.normalisation
    )
    close(torch.from_numpy(again).float(), golden["sampled32"][..., :7], 2e-4)


@pytest.mark.parametrize("kind", ["MEAN_STD", "QUANTILES", "MIN_MAX"])
def test_lerobots_normalisations_both_ways(kind: str) -> None:
    given = load_file(HERE / "normalisation.safetensors")
    ours = {"MEAN_STD": "normal", "QUANTILES": "quantiles", "MIN_MAX": "min_max"}[kind]
    stats = json.loads((HERE / "stats.json").read_text())
    for name in ("state", "action"):
        rows = stats["observation.state" if name == "state" else name]
        columns = {row: np.array(rows[row], np.float32) for row in ("mean", "std", "min", "max", "q01", "q99")}
        statistics = FeatureStatistics(**columns, mask=np.ones(len(rows["mean"]), np.bool_))
        normalised = statistics.normalise(given[name].numpy(), ours)
        np.testing.assert_allclose(normalised, given[f"lerobot.{kind}.{name}"], rtol=1e-6, atol=2e-6)
        if name == "action":
            back = statistics.denormalise(given[f"lerobot.{kind}.action"].numpy(), ours)
            np.testing.assert_allclose(back, given[f"lerobot.{kind}.action_back"], rtol=1e-6, atol=2e-6)


def openpi_layout(directory: Path, variant: str) -> Path:
    """The published one, of the same weights: no prefix, statistics below `assets`."""
    shutil.copytree(HERE / "openpi_pi05", directory)
    weights = load_file(HERE / variant / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in weights.items()}, directory / "model.safetensors")
    return directory


def test_openpis_layout_gives_the_same_velocity_and_its_own_normalisation(
    tmp_path: Path, variant: str, golden: dict[str, torch.Tensor], features: Features
) -> None:
    policy = from_openpi(openpi_layout(tmp_path / "openpi", variant), SETTINGS, ADDED)
    head = policy.model.head
    assert isinstance(head, Pi0Head)
    assert head.config.variant == variant
    close(head.velocity(features, golden["x_t"], golden["time"]), golden["v_t"])
    given = load_file(HERE / "normalisation.safetensors")
    kind = {"pi0": "z", "pi05": "quantile"}[variant]
    conventions = policy.transforms.conventions
    for name, statistics in (("state", conventions.statistics.proprio), ("action", conventions.statistics.action)):
        ours = statistics.normalise(given[name].numpy(), conventions.normalisation)
        np.testing.assert_allclose(ours, given[f"openpi.{kind}.{name}"], rtol=2e-5, atol=1e-5)


def test_openpis_prompts(tmp_path: Path, variant: str) -> None:
    policy = from_openpi(openpi_layout(tmp_path / "openpi", variant), SETTINGS, ADDED)
    given = load_file(HERE / "openpi_prompts.safetensors")
    prompts = json.loads((HERE / "openpi_prompts.json").read_text())["prompts"]
    for i, (text, state) in enumerate(zip(prompts, given["states"], strict=True)):
        ids = policy.model.backbone.tokenize_with_state(text, state.numpy())
        assert ids[2 * 16 :] == given[f"{i}.{variant}.tokens"][given[f"{i}.{variant}.mask"]].tolist()


def test_an_imported_policy_acts_and_comes_back_from_disk(
    tmp_path: Path, policy: Policy, observations: list[Observation]
) -> None:
    chunks, _ = policy.act(observations, policy.initial_memory(2))
    assert chunks.shape == (2, 10, 7)
    policy.save(tmp_path / "policy")
    again, _ = Policy.load(tmp_path / "policy").act(observations, policy.initial_memory(2))
    np.testing.assert_array_equal(again, chunks)
    policy.require_prompts([o.instruction for o in observations])


def test_an_export_is_what_was_imported(tmp_path: Path, variant: str, policy: Policy) -> None:
    """Names, numbers, and the files beside the weights; but for a tensor that is never used."""
    policy.save(tmp_path / "policy")
    to_lerobot(Policy.load(tmp_path / "policy"), tmp_path / "exported")
    before, after = (load_file(there / "model.safetensors") for there in (HERE / variant, tmp_path / "exported"))
    before = {f"model.{name.removeprefix('model.')}": x for name, x in before.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) or "gemma_expert.lm_head" in name for name, x in before.items())
    names = {path.name for path in (HERE / variant).iterdir()} - {"golden.json", "golden.safetensors"}
    assert {path.name for path in (tmp_path / "exported").iterdir()} == names


def with_adapters(policy: Policy) -> Policy:
    """The policy with adapters that have learned something."""
    LoRAConfig(rank=2).apply(policy.model.backbone)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return replace(policy, config=replace(policy.config, lora=LoRAConfig(rank=2)))


def test_an_export_has_what_adapters_learned(
    tmp_path: Path, variant: str, observations: list[Observation]
) -> None:
    tuned = with_adapters(from_lerobot(HERE / variant, SETTINGS, ADDED))
    to_lerobot(tuned.merged(), tmp_path / "exported")
    again = from_lerobot(tmp_path / "exported", SETTINGS, ADDED)
    ours, _ = tuned.act(observations, tuned.initial_memory(2))
    np.testing.assert_allclose(again.act(observations, again.initial_memory(2))[0], ours, atol=1e-4)


def test_openpis_layout_is_not_exported_as_lerobots(tmp_path: Path, variant: str) -> None:
    policy = from_openpi(openpi_layout(tmp_path / "openpi", variant), SETTINGS, ADDED)
    with pytest.raises(ValueError, match="not imported from LeRobot's layout"):
        to_lerobot(policy, tmp_path / "exported")


@pytest.mark.parametrize("memory", [KVMemoryConfig(), LatentMemoryConfig()])
def test_memories_that_feed_the_backbone_reach_the_expert(
    memory: MemoryConfig, variant: str, policy: Policy, observations: list[Observation]
) -> None:
    remembers = from_lerobot(HERE / variant, SETTINGS, replace(ADDED, memory=memory))
    state = remembers.initial_memory(2)
    for t in range(2):
        seen = [replace(o, t=t) for o in observations]
        ours, state = remembers.act(seen, state)
    theirs, _ = policy.act(seen, policy.initial_memory(2))
    assert abs(ours - theirs).max() > 1e-6


@pytest.mark.parametrize("memory", [GRUMemoryConfig(), BankMemoryConfig()])
def test_a_memory_changes_nothing_before_it_is_trained(
    memory: MemoryConfig, variant: str, policy: Policy, observations: list[Observation]
) -> None:
    remembers = from_lerobot(HERE / variant, SETTINGS, replace(ADDED, memory=memory))
    state = remembers.initial_memory(2)
    for t in range(2):
        seen = [replace(o, t=t) for o in observations]
        ours, state = remembers.act(seen, state)
        theirs, _ = policy.act(seen, policy.initial_memory(2))
        np.testing.assert_array_equal(ours, theirs)


def test_a_row_does_not_depend_on_its_neighbours(policy: Policy, observations: list[Observation]) -> None:
    both, _ = policy.act(observations, policy.initial_memory(2))
    for i, observation in enumerate(observations):
        alone, _ = policy.act([observation], policy.initial_memory(1))
        np.testing.assert_allclose(alone[0], both[i], atol=1e-4)


def test_the_loss_trains_expert_memory_and_adapters(variant: str, observations: list[Observation]) -> None:
    policy = from_lerobot(HERE / variant, SETTINGS, replace(ADDED, memory=GRUMemoryConfig()))
    LoRAConfig(rank=4).apply(policy.model.backbone)
    inputs = policy.transforms.inputs(observations)
    actions, weight = torch.zeros(2, 10, 7), torch.ones(2, 10, 7, dtype=torch.bool)
    noise = torch.randn(2, *policy.model.head.loss_noise_shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(8):
        features, _ = policy.model.memory.observe(
            policy.model.backbone, inputs, policy.initial_memory(2), torch.zeros(2, dtype=torch.long)
        )
        loss = policy.model.head.loss(features, actions, weight, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    reached = {n: bool(p.grad is not None and p.grad.any()) for n, p in policy.model.named_parameters()}
    assert all(reached[n] for n in reached if "lora_B" in n and "language_model.layers.0" in n and "k_proj" in n)
    assert all(reached[n] for n in reached if n.startswith("head.expert.layers.0"))
    assert any(reached[n] for n in reached if n.startswith("memory."))


def test_a_weight_that_is_missing_or_unknown_is_named(tmp_path: Path, variant: str) -> None:
    directory = tmp_path / "policy"
    shutil.copytree(HERE / variant, directory)
    weights = load_file(directory / "model.safetensors")
    removed = next(name for name in weights if name.endswith("gemma_expert.model.layers.1.mlp.up_proj.weight"))
    save_file({name: x for name, x in weights.items() if name != removed}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weight .*layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        from_lerobot(directory, SETTINGS, ADDED)
    save_file(weights | {"model.gripper_head.weight": torch.zeros(2)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="has the unknown weight gripper_head"):
        from_lerobot(directory, SETTINGS, ADDED)
    (directory / "model.safetensors").write_bytes((HERE / variant / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="missing or damaged"):
        from_lerobot(directory, SETTINGS, ADDED)


def test_another_familys_files_are_refused_in_one_line(tmp_path: Path, variant: str) -> None:
    directory = tmp_path / "policy"
    shutil.copytree(HERE / variant, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"type": "act"}))
    with pytest.raises(ValueError, match="policy of type 'act'"):
        from_lerobot(directory, SETTINGS, ADDED)
    (directory / "config.json").write_text(json.dumps(config | {"use_relative_actions": True}))
    with pytest.raises(ValueError, match="use_relative_actions is True"):
        from_lerobot(directory, SETTINGS, ADDED)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "policy_preprocessor.json").unlink()
    with pytest.raises(ValueError, match=r"policy_preprocessor\.json is missing"):
        from_lerobot(directory, SETTINGS, ADDED)
    with pytest.raises(ValueError, match=r"'d'\).*one to 3, for base_0_rgb"):
        from_lerobot(HERE / variant, SETTINGS, replace(ADDED, cameras=("a", "b", "c", "d")))
