"""pi0-FAST: a tiny checkpoint that LeRobot 0.6.1 wrote, and what it computed from it, stage by stage.

Everything is float32 and random. LeRobot acts with a `<bos>` inside the prompt, and trains with it behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ipvla.models.action_tokens import ActionTokenError
from ipvla.models.features import Features
from ipvla.models.heads import Pi0FastHeadConfig
from ipvla.models.heads.pi0_fast import Pi0FastHead
from ipvla.models.heads.protocol import draw_noise
from ipvla.models.memory import BankMemoryConfig, GRUMemoryConfig, KVMemoryConfig, MemoryConfig
from ipvla.policy import Policy
from ipvla.types import NO_TOKEN, Observation
from ray_jobs.importing.pi import Added, PiConfig
from ray_jobs.importing.pi0_fast import from_lerobot_fast
from ray_jobs.importing.to_lerobot import to_lerobot
from tests.checkpoints.test_pi import close, with_adapters

HERE = Path(__file__).parent / "pi"
SOURCE, FAST = HERE / "pi0_fast", HERE / "fast_tokenizer"
SETTINGS = PiConfig(tokenizer=str(HERE / "tokenizer"), vision_heads=3, action_tokenizer=str(FAST))
ADDED = Added("float32", ("base", "wrist"))  # the third camera is missing
END = 556  # `|`


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(SOURCE / "golden.safetensors")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    content: dict[str, list[str]] = json.loads((SOURCE / "golden.json").read_text())
    return content


@pytest.fixture(scope="module")
def acts() -> Policy:
    return from_lerobot_fast(SOURCE, SETTINGS, ADDED)


@pytest.fixture(scope="module")
def trains() -> Policy:
    return from_lerobot_fast(SOURCE, replace(SETTINGS, bos="behind"), ADDED)


@pytest.fixture(scope="module")
def observations(golden: dict[str, torch.Tensor], texts: dict[str, list[str]]) -> list[Observation]:
    pictures = {
        name: golden[f"raw.observation.images.{there}_rgb"].permute(0, 2, 3, 1).numpy()
        for there, name in (("base_0", "base"), ("left_wrist_0", "wrist"))
    }
    states = golden["raw.observation.state"].numpy()
    return [
        Observation({n: x[i] for n, x in pictures.items()}, states[i], texts["raw.task"][i], 0, f"episode {i}")
        for i in range(2)
    ]


def seen(policy: Policy, observations: list[Observation]) -> Features:
    backbone = policy.model.backbone
    with torch.no_grad():
        return replace(backbone(policy.transforms.inputs(observations)).features, language=backbone)


def head_of(policy: Policy, **settings: object) -> Pi0FastHead:
    """The policy's head, with other settings."""
    head, config = policy.model.head, policy.config.head
    assert isinstance(head, Pi0FastHead)
    assert isinstance(config, Pi0FastHeadConfig)
    built = replace(config, **settings).build(policy.model.backbone, 8, *head.shape)  # type: ignore[arg-type]
    assert isinstance(built, Pi0FastHead)
    return built


def up_to_the_end(ids: torch.Tensor) -> torch.Tensor:
    ended = (ids == END).cumsum(1) - (ids == END).long() > 0
    return ids.masked_fill(ended, NO_TOKEN)


def test_prompts_are_theirs(
    trains: Policy, observations: list[Observation], golden: dict[str, torch.Tensor], texts: dict[str, list[str]]
) -> None:
    inputs = trains.transforms.inputs(observations)
    close(inputs.proprio, golden["batch.observation.state"], 1e-6)
    tokens, mask = golden["batch.observation.language.tokens"], golden["batch.observation.language.attention_mask"]
    for i in range(2):
        ids = inputs.input_ids[i, inputs.attention_mask[i]]
        assert ids[2 * 16 :].tolist() == tokens[i, mask[i]].tolist()
    padded = from_lerobot_fast(SOURCE, replace(SETTINGS, state_numbers=32), ADDED).model.backbone.config
    for task, state, theirs in zip(
        texts["raw.task"], inputs.proprio.numpy(), texts["batch.task of LeRobot 0.4.4"], strict=True
    ):
        assert padded.text(task, state) == theirs


def test_embeddings_and_layers_are_theirs(
    trains: Policy, observations: list[Observation], golden: dict[str, torch.Tensor]
) -> None:
    inputs = trains.transforms.inputs(observations)
    embedded, features = trains.model.backbone.embed(inputs), seen(trains, observations)
    assert features.layers is not None
    for i in range(2):
        real, ours = golden["pad"][i], features.layers.valid[i]
        close(embedded.tokens[i, ours], golden["embs"][i, real], 1e-6)
        close(features.layers.hidden[i, -1, ours], golden["hidden"][i, real], 1e-5)


def test_action_tokens_logits_and_loss_are_theirs(
    trains: Policy, observations: list[Observation], golden: dict[str, torch.Tensor]
) -> None:
    features, head = seen(trains, observations), head_of(trains)
    actions = golden["batch.action"]
    said = head.said(actions, torch.ones(2, 10, dtype=torch.bool))
    for i, theirs in enumerate(golden["batch.action.tokens"]):
        assert said[i][said[i] != NO_TOKEN].tolist() == theirs[golden["batch.action.token_mask"][i]].tolist()[1:]
    close(head.logits(features, said)[:, :24], golden["logits_of_first_24_action_positions"])
    weight = torch.ones(2, 10, 7, dtype=torch.bool)
    loss = json.loads((SOURCE / "golden.json").read_text())["loss"]
    assert head.loss(features, actions, weight).item() == pytest.approx(loss, abs=1e-4)


def test_what_it_writes_freely_is_theirs(
    acts: Policy, observations: list[Observation], golden: dict[str, torch.Tensor]
) -> None:
    """Random weights write no chunk, and no such ids become an action."""
    features, head = seen(acts, observations), head_of(acts, constrained=False, max_tokens=24)
    written = head.write(features)
    assert written.tolist() == golden["greedy"].tolist()
    logits = head.logits(features, written)[:, :8].transpose(0, 1)
    close(logits, golden["greedy.logits_of_first_8_steps"])
    with pytest.raises(ActionTokenError, match="does not begin with `Action: `: 24 ids"):
        head.sample(features)


def test_ids_become_their_actions(acts: Policy, golden: dict[str, torch.Tensor]) -> None:
    actions = head_of(acts).actions(up_to_the_end(golden["detokenize.tokens"]))
    close(actions, golden["detokenize.actions"], 1e-6)
    close(torch.from_numpy(acts.transforms.denormalise(actions)).float(), golden["detokenize.unnormalized"], 1e-6)


def fewer(ids: torch.Tensor) -> None:
    """A FAST token less: LeRobot fills the chunk up with zeros."""
    ids[0, 4:-1] = ids[0, 5:].clone()


def foreign(ids: torch.Tensor) -> None:
    ids[1, 7] = 400


def endless(ids: torch.Tensor) -> None:
    ids[0, ids[0] == END] = 700


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fewer, "row 0: .* coefficients, and a chunk has 70"),
        (foreign, "row 1 has token 427, and action tokens are"),
        (endless, r"row 0: what was written has no `\|` at its end"),
    ],
)
def test_bad_codes_never_become_an_action(
    acts: Policy, golden: dict[str, torch.Tensor], spoil: Callable[[torch.Tensor], None], message: str
) -> None:
    ids = golden["detokenize.tokens"].clone()
    spoil(ids)
    with pytest.raises(ActionTokenError, match=message):
        head_of(acts).actions(up_to_the_end(ids))


def test_constrained_it_writes_chunks_alone_and_drawn_as_the_noise_says(
    acts: Policy, observations: list[Observation]
) -> None:
    features, head = seen(acts, observations), head_of(acts)
    written = head.write(features)
    assert written[:, :3].tolist() == [head.opening] * 2
    assert torch.isfinite(head.actions(written)).all()
    assert acts.require_finite() is acts
    from_lerobot_fast(SOURCE, SETTINGS, replace(ADDED, dtype="bfloat16")).require_finite()
    warm = head_of(acts, temperature=2.0)
    assert warm.noise_shape is not None
    noise = draw_noise([1, 2], warm.noise_shape)
    drawn = warm.write(features, noise)
    assert drawn.tolist() != written.tolist()
    assert drawn.tolist() == warm.write(features, noise).tolist()
    assert torch.isfinite(warm.actions(drawn)).all()


def test_it_writes_the_chunk_that_it_has_learned(observations: list[Observation]) -> None:
    """What is trained token by token is what is written, constrained or not."""
    policy = from_lerobot_fast(SOURCE, SETTINGS, ADDED)
    features_of = policy.model.backbone
    actions = torch.linspace(-0.5, 0.5, 20).view(2, 10, 1).repeat(1, 1, 7)
    weight = torch.ones(2, 10, 7, dtype=torch.bool)
    inputs = policy.transforms.inputs(observations)
    optimizer = torch.optim.Adam(policy.model.parameters(), 1e-2)
    for _ in range(40):
        features = replace(features_of(inputs).features, language=features_of)
        loss = policy.model.head.loss(features, actions, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    features = seen(policy, observations)
    for constrained in (True, False):
        chunks = head_of(policy, constrained=constrained, max_tokens=64).sample(features)
        close(chunks, actions, 0.05)


@pytest.mark.parametrize("memory", [GRUMemoryConfig(), BankMemoryConfig()])
def test_a_memory_changes_no_bit_before_it_is_trained(
    memory: MemoryConfig, acts: Policy, observations: list[Observation]
) -> None:
    remembers = from_lerobot_fast(SOURCE, SETTINGS, replace(ADDED, memory=memory))
    assert remembers.model.memory.close()
    state = remembers.initial_memory(2)
    for t in range(2):
        now = [replace(o, t=t) for o in observations]
        ours, state = remembers.act(now, state)
        np.testing.assert_array_equal(ours, acts.act(now, acts.initial_memory(2))[0])


@pytest.mark.parametrize("memory", [GRUMemoryConfig(), KVMemoryConfig()])
def test_what_is_remembered_reaches_the_loss(memory: MemoryConfig, observations: list[Observation]) -> None:
    policy = from_lerobot_fast(SOURCE, SETTINGS, replace(ADDED, memory=memory))
    model, state = policy.model, policy.initial_memory(2)
    losses = []
    for t in range(2):
        features, state = model.memory.observe(
            model.backbone, policy.transforms.inputs(observations), state, torch.full((2,), t)
        )
        weight = torch.ones(2, 10, 7, dtype=torch.bool)
        losses.append(model.head.loss(replace(features, language=model.backbone), torch.zeros(2, 10, 7), weight))
    losses[-1].backward()
    assert losses[0].item() != losses[1].item()
    assert any(p.grad is not None and p.grad.any() for p in model.memory.parameters()) or not list(
        model.memory.parameters()
    )


def test_an_imported_policy_comes_back_from_disk_and_refuses_another_tokenizer(
    tmp_path: Path, acts: Policy, observations: list[Observation]
) -> None:
    chunks, _ = acts.act(observations, acts.initial_memory(2))
    acts.save(tmp_path / "policy")
    again, _ = Policy.load(tmp_path / "policy").act(observations, acts.initial_memory(2))
    np.testing.assert_array_equal(again, chunks)
    described = tmp_path / "policy" / "action_tokenizer" / "processor_config.json"
    described.write_text(described.read_text().replace("-36", "-35"))
    with pytest.raises(ValueError, match="is not the one that these weights were trained with"):
        Policy.load(tmp_path / "policy")


def test_an_export_is_what_was_imported(tmp_path: Path, acts: Policy) -> None:
    acts.save(tmp_path / "policy")
    to_lerobot(Policy.load(tmp_path / "policy"), tmp_path / "exported")
    before, after = (load_file(there / "model.safetensors") for there in (SOURCE, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    names = {path.name for path in SOURCE.iterdir()} - {"golden.json", "golden.safetensors"}
    assert {path.name for path in (tmp_path / "exported").iterdir()} == names


def test_an_export_has_what_adapters_learned(tmp_path: Path, observations: list[Observation]) -> None:
    tuned = with_adapters(from_lerobot_fast(SOURCE, SETTINGS, ADDED))
    to_lerobot(tuned.merged(), tmp_path / "exported")
    again = from_lerobot_fast(tmp_path / "exported", SETTINGS, ADDED)
    ours, _ = tuned.act(observations, tuned.initial_memory(2))
    np.testing.assert_allclose(again.act(observations, again.initial_memory(2))[0], ours, atol=1e-4)


def test_tokenizers_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 700 tokens, and actions are written with 572 to 827.*PaliGemma"):
        from_lerobot_fast(SOURCE, replace(SETTINGS, tokenizer=str(cut_tokenizer(tmp_path / "words"))), ADDED)
    with pytest.raises(ValueError, match=r"no FAST tokenizer in .*; give a directory with tokenizer\.json"):
        from_lerobot_fast(SOURCE, replace(SETTINGS, action_tokenizer=str(HERE / "tokenizer")), ADDED)
    shutil.copytree(FAST, tmp_path / "fast")
    described = tmp_path / "fast" / "processor_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"time_horizon": 16, "action_dim": 7}))
    with pytest.raises(ValueError, match="was fitted on chunks of 16 actions"):
        from_lerobot_fast(SOURCE, replace(SETTINGS, action_tokenizer=str(tmp_path / "fast")), ADDED)


def cut_tokenizer(directory: Path) -> Path:
    """The words' tokenizer without `<loc>` and `<seg>`, as Gemma's own has none."""
    shutil.copytree(HERE / "tokenizer", directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 700]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < 700}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def test_a_weight_that_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    shutil.copytree(SOURCE, directory)
    weights = load_file(SOURCE / "model.safetensors")
    removed = next(name for name in weights if name.endswith("language_model.layers.1.mlp.up_proj.weight"))
    save_file({name: x for name, x in weights.items() if name != removed}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weight .*layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        from_lerobot_fast(directory, SETTINGS, ADDED)
    save_file(weights | {"model.action_in_proj.weight": torch.zeros(2)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="has the unknown weight action_in_proj"):
        from_lerobot_fast(directory, SETTINGS, ADDED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gap": -1}, "head.gap is -1; give 0 or more"),
        ({"max_tokens": 0}, "head.max_tokens is 0; give 1 or more"),
        ({"temperature": -1.0}, "head.temperature is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pi0FastHeadConfig(**settings)  # type: ignore[arg-type]
