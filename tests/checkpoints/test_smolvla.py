"""SmolVLA: a tiny checkpoint that LeRobot 0.6.1 wrote, and what it computed from it, stage by stage.

Its two cameras have pictures of different sizes, which one observation here cannot have: the first is shown twice,
and where the golden figures need both, the pictures are given to the vision tower as they are after padding.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ipvla.models.backbones.letterbox import letterboxed
from ipvla.models.backbones.protocol import BackboneOutput
from ipvla.models.heads.pi0 import Pi0Head
from ipvla.models.memory import BankMemoryConfig, KVMemoryConfig, LatentMemoryConfig, MemoryConfig
from ipvla.policy import Policy
from ipvla.types import ModelInputs, Observation
from ray_jobs.import_policy import ImportConfig, ImportedModelConfig, imported, main
from ray_jobs.importing.pi import PiConfig
from ray_jobs.importing.to_lerobot import to_lerobot

HERE = Path(__file__).parent / "smolvla"
SETTINGS = PiConfig(tokenizer=str(HERE / "tokenizer"), vision_heads=3, head_size=8)


def config(policy: Path, memory: MemoryConfig | None = None) -> ImportConfig:
    added = ImportedModelConfig() if memory is None else ImportedModelConfig(memory)
    cameras = ("camera1", "camera2")  # the third one is missing
    return ImportConfig(HERE / "policy", policy, dtype="float32", cameras=cameras, pi=SETTINGS, model=added)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """As it comes out of its directory again."""
    directory = tmp_path_factory.mktemp("policies") / "smolvla"
    main(config(directory))
    return Policy.load(directory)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(HERE / "golden.safetensors")


@pytest.fixture(scope="module")
def observations(golden: dict[str, torch.Tensor]) -> list[Observation]:
    texts = json.loads((HERE / "golden.json").read_text())["raw.task"]
    pictures = golden["raw.observation.images.camera1"].permute(0, 2, 3, 1).numpy()
    states = golden["raw.observation.state"].numpy()
    return [
        Observation({"camera1": pictures[i], "camera2": pictures[i]}, states[i], texts[i], 0, f"episode {i}")
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def inputs(policy: Policy, observations: list[Observation]) -> ModelInputs:
    return policy.transforms.inputs(observations)


@pytest.fixture
def output(
    policy: Policy, inputs: ModelInputs, golden: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> BackboneOutput:
    pictures = torch.stack([golden["image.0"], golden["image.1"]], 1).flatten(0, 1)
    monkeypatch.setattr(policy.model.backbone, "_pixels", lambda images: pictures)
    with torch.no_grad():
        return policy.model.backbone(inputs)


@pytest.fixture
def head(policy: Policy) -> Pi0Head:
    assert isinstance(policy.model.head, Pi0Head)
    return policy.model.head


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=atol)


def test_states_prompts_and_pictures_are_theirs(inputs: ModelInputs, golden: dict[str, torch.Tensor]) -> None:
    close(inputs.proprio, golden["batch.observation.state"], 1e-6)
    tokens, mask = golden["batch.observation.language.tokens"], golden["batch.observation.language.attention_mask"]
    for i in range(2):
        assert inputs.input_ids[i, inputs.attention_mask[i]][2 * 4 :].tolist() == tokens[i, mask[i]].tolist()
        pictures = golden[f"raw.observation.images.camera{i + 1}"].permute(0, 2, 3, 1)
        close(letterboxed(pictures, 64, "corner"), golden[f"image.{i}"], 1e-6)


def test_the_prefix_is_theirs_in_every_layer(
    inputs: ModelInputs, output: BackboneOutput, golden: dict[str, torch.Tensor]
) -> None:
    layers, pad = output.features.layers, golden["prefix_pad"]
    assert layers is not None
    for i in range(2):
        own = layers.valid[i]
        close(output.features.perception[i].unflatten(0, (2, 4))[1], golden["vision.1"][i], 1e-5)
        close(output.hidden_states[0][i, own], golden["prefix_embs"][i, pad[i]], 2e-5)
        close(output.hidden_states[-1][i, own], golden["prefix_out"][i, pad[i]])
        for layer in (0, 1, 3):
            for ours, name in ((layers.keys, "key"), (layers.values, "value")):
                theirs = golden[f"cache.{name}.{layer}"][i].transpose(0, 1).flatten(1)
                close(ours[i, layer, own], theirs[pad[i]])


def test_velocity_losses_and_sampled_chunks_are_theirs(
    policy: Policy, head: Pi0Head, output: BackboneOutput, golden: dict[str, torch.Tensor]
) -> None:
    features, figures = output.features, json.loads((HERE / "golden.json").read_text())
    with torch.no_grad():
        close(head.velocity(features, golden["x_t"], golden["time"]), golden["v_t"])
        losses = head.losses(features, golden["batch.action"], golden["noise"], golden["time"])
        close(losses[..., :7], golden["losses"][..., :7])
        assert losses[..., :7].mean().item() == pytest.approx(figures["loss"], abs=1e-4)
        there = ~golden["action_is_pad"]
        assert losses[..., :7][there].mean().item() == pytest.approx(figures["loss_with_action_is_pad"], abs=1e-4)
        close(head.flow(features, golden["noise"]), golden["sampled32"])
        chunk = policy.transforms.denormalise(head.sample(features, golden["noise"]))
    close(torch.from_numpy(chunk), golden["sampled"])


def test_pictures_and_words_do_not_read_the_state(policy: Policy, inputs: ModelInputs) -> None:
    backbone = policy.model.backbone
    one, other = (backbone(replace(inputs, proprio=inputs.proprio + shift)) for shift in (0, 0.5))
    embedded = backbone.embed(inputs)
    state = torch.nn.functional.one_hot(embedded.last, embedded.tokens.shape[1]).bool()
    for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
        assert torch.equal(a[embedded.valid & ~state], b[embedded.valid & ~state])
    assert not torch.allclose(one.features.cognition, other.features.cognition)


def test_a_row_does_not_depend_on_its_neighbours(policy: Policy, observations: list[Observation]) -> None:
    both, _ = policy.act(observations, policy.initial_memory(2))
    for i, observation in enumerate(observations):
        alone, _ = policy.act([observation], policy.initial_memory(1))
        np.testing.assert_allclose(alone[0], both[i], atol=1e-4)


@pytest.mark.parametrize("memory", [BankMemoryConfig(), KVMemoryConfig(), LatentMemoryConfig()])
def test_memories_work_on_it(
    memory: MemoryConfig, tmp_path: Path, policy: Policy, observations: list[Observation]
) -> None:
    """One that enriches the cognition changes nothing before it is trained; one that feeds the backbone does."""
    remembers = imported(config(tmp_path / "p", memory))
    state, same = remembers.initial_memory(2), []
    for t in range(3):
        seen = [replace(o, t=t) for o in observations]
        ours, state = remembers.act(seen, state)
        theirs, _ = policy.act(seen, policy.initial_memory(2))
        same.append(np.array_equal(ours, theirs))
    assert all(same) == isinstance(memory, BankMemoryConfig)


def test_settings_that_are_not_rebuilt_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "source"
    shutil.copytree(HERE / "policy", directory)
    content = json.loads((directory / "config.json").read_text())
    for changes, message in (
        ({"attention_mode": "self_attn"}, "attention_mode is 'self_attn'"),
        ({"resize_imgs_with_padding": [48, 48]}, r"\[48, 48\] pixels.*takes 64"),
    ):
        (directory / "config.json").write_text(json.dumps(content | changes))
        with pytest.raises(ValueError, match=message):
            imported(replace(config(tmp_path / "p"), source=directory))


def test_an_export_is_what_was_imported(tmp_path: Path, policy: Policy) -> None:
    to_lerobot(policy, tmp_path / "exported")
    before, after = (load_file(there / "model.safetensors") for there in (HERE / "policy", tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert {p.name for p in (tmp_path / "exported").iterdir()} == {p.name for p in (HERE / "policy").iterdir()}
