"""Every backbone: features, per-layer hidden states, instruction mask, answers, adapters, save and load."""

from collections.abc import Callable
from pathlib import Path

import draccus
import peft
import pytest
import torch

from ipvla.models.adapters import LoRAConfig, factors, layer_of, save_adapters
from ipvla.models.backbones import (
    Backbone,
    BackboneConfig,
    Context,
    KeysValues,
    PaliGemmaConfig,
    TinyConfig,
)
from ipvla.models.backbones.residual_trunk import ResidualTrunk
from ipvla.models.backbones.tiny_vlm import TinyVLM
from ipvla.types import NO_TOKEN
from tests.models.conftest import inputs_for

WORDS = ["press the red button", "press the blue button"]


def test_features_and_one_hidden_state_per_layer(backbone: Backbone) -> None:
    output = backbone(inputs_for(backbone, WORDS))
    assert output.features.cognition.shape == (2, backbone.width)
    assert output.features.perception.shape[::2] == (2, backbone.perception_size)
    assert len(output.hidden_states) == backbone.num_layers + 1
    tokens = output.instruction_mask.shape[1]
    assert all(hidden.shape == (2, tokens, backbone.width) for hidden in output.hidden_states)


def test_the_hidden_states_are_what_the_layers_emit(backbone: Backbone) -> None:
    seen = []
    layers = backbone.language_layers()
    assert len(layers) == backbone.num_layers >= 6

    def keep(module: torch.nn.Module, args: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[-2].register_forward_hook(keep)
    output = backbone(inputs_for(backbone, WORDS))
    handle.remove()
    torch.testing.assert_close(seen[0], output.hidden_states[-2])


def test_the_instruction_mask_covers_the_instruction_alone(backbone: Backbone) -> None:
    short, long = (
        backbone(inputs_for(backbone, ["press", "press the red button"])).instruction_mask.sum(1).tolist()
    )
    assert long - short == 3


def test_the_instruction_reaches_the_cognition(backbone: Backbone) -> None:
    a = backbone(inputs_for(backbone, [WORDS[0]])).features.cognition
    b = backbone(inputs_for(backbone, [WORDS[1]])).features.cognition
    assert not torch.allclose(a, b)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_padding(backbone: Backbone) -> None:
    both = inputs_for(backbone, ["press", "press the red button"])
    alone = both.map(lambda x: x[:1])
    torch.testing.assert_close(
        backbone(both).features.cognition[:1], backbone(alone).features.cognition, atol=1e-5, rtol=1e-4
    )


def test_answers_can_be_learned_and_are_generated_token_by_token(backbone: Backbone) -> None:
    inputs = inputs_for(backbone, WORDS)
    questions, answers = ["which button is lit", "which button is red"], ["the red button", "blue"]
    optimizer = torch.optim.Adam(backbone.parameters(), lr=3e-3)
    backbone.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss = backbone.answer_loss(inputs, questions, answers)
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert backbone.eval().answer(inputs, questions) == answers


def last_layer_outputs(backbone: Backbone, run: Callable[[], object]) -> list[torch.Tensor]:
    """What the last language layer emitted while `run` ran, call by call."""
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: object) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = backbone.language_layers()[-1].register_forward_hook(keep)
    with torch.no_grad():
        run()
    handle.remove()
    return seen


def test_a_written_token_sees_no_later_one(backbone: Backbone) -> None:
    inputs = inputs_for(backbone.eval(), WORDS[:1])
    a, b = (
        last_layer_outputs(backbone, lambda r=reply: backbone.write_loss(inputs, torch.tensor([r])))[0]
        for reply in map(backbone.tokenize_text, ("red blue", "red button"))
    )
    torch.testing.assert_close(a[:, :-2], b[:, :-2])
    assert not torch.allclose(a[:, -2], b[:, -2])


def test_writing_with_a_cached_prefix_equals_reading_the_whole_text(backbone: Backbone) -> None:
    inputs = inputs_for(backbone.eval(), WORDS[:1])
    written: list[torch.Tensor] = []
    steps = last_layer_outputs(backbone, lambda: written.append(backbone.write(inputs, 4)))
    assert (written[0] != NO_TOKEN).all(), "random weights do not end at once here"
    whole = last_layer_outputs(backbone, lambda: backbone.write_loss(inputs, written[0]))[0]
    assert [step.shape[1] for step in steps[1:4]] == [1, 1, 1], "the prompt is read once"
    torch.testing.assert_close(torch.cat(steps[1:4], 1), whole[:, -5:-2], atol=1e-4, rtol=1e-3)


def test_written_rows_do_not_depend_on_their_neighbours(backbone: Backbone) -> None:
    both = inputs_for(backbone.eval(), ["press", "press the red button"])
    together = backbone.write(both, 5)
    alone = torch.cat([backbone.write(both.map(lambda x, r=row: x[r : r + 1]), 5) for row in range(2)])
    assert together.tolist() == alone.tolist()


def test_context_tokens_are_read_and_rewritten(backbone: Backbone) -> None:
    embedded = backbone.eval().embed(inputs_for(backbone, ["press", "press the red button"]))
    plain = backbone.encode(embedded)
    tokens = torch.randn(2, 3, backbone.width, requires_grad=True)
    output = backbone.encode(embedded, Context(tokens=tokens))
    assert output.context_tokens is not None
    assert output.context_tokens.shape == (2, 3, backbone.width)
    assert [h.shape for h in output.hidden_states] == [h.shape for h in plain.hidden_states]
    assert not torch.allclose(output.features.cognition, plain.features.cognition)
    (gradient,) = torch.autograd.grad(output.features.cognition[0].square().sum(), tokens)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0, "another row's"


def test_kept_keys_and_values_stand_for_the_tokens_they_came_from(backbone: Backbone) -> None:
    """Hidden, they change nothing; visible, they are read."""
    embedded = backbone.eval().embed(inputs_for(backbone, ["press", "press the red button"]))
    plain = backbone.encode(embedded)
    kept = backbone.encode(embedded, Context(keep=2)).last_keys_values
    assert kept is not None
    assert kept[0].shape == (2, backbone.num_layers, 2, backbone.cache_size)
    for shown, bias in ((False, -torch.inf), (True, 0.0)):
        past = KeysValues(*kept, torch.full((2, backbone.heads, 2), bias))
        with_past = backbone.encode(embedded, Context(past=past)).features.cognition
        same = torch.allclose(with_past, plain.features.cognition, atol=1e-5)
        assert same != shown


@pytest.mark.parametrize("last_layers", [0, 4])
def test_lora_reaches_the_chosen_layers_and_nothing_else_trains(backbone: Backbone, last_layers: int) -> None:
    before = backbone(inputs_for(backbone, WORDS)).features.cognition
    LoRAConfig(rank=2, last_layers=last_layers, modules=("q_proj", "v_proj")).apply(backbone)
    trainable = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == (last_layers or backbone.num_layers) * 2 * 2
    assert any(f"layers.{backbone.num_layers - 1}." in name for name in trainable)
    assert not any("vision" in name for name in trainable)
    torch.testing.assert_close(backbone(inputs_for(backbone, WORDS)).features.cognition, before)


def test_adapters_are_found_under_the_names_that_their_modules_had(backbone: Backbone) -> None:
    config = LoRAConfig(rank=2, last_layers=4, modules=("q_proj", "down_proj"))
    targets = config.targets(backbone)
    config.apply(backbone)
    found = factors(backbone)
    assert found.keys() == targets.keys()
    for name, (a, b) in found.items():
        assert (a.shape, b.shape) == ((2, targets[name].in_features), (targets[name].out_features, 2))
    last = backbone.num_layers - 1
    assert sorted({layer_of(backbone, name) for name in found}) == [last - 3, last - 2, last - 1, last]
    assert layer_of(backbone, "trunk.mix") is None


def test_lora_reaches_the_tiny_trunk() -> None:
    backbone = TinyConfig(width=32, heads=2, trunk_channels=8).build(5, 1, 28)
    LoRAConfig(rank=2, modules=(), extra=("trunk.conv2", "trunk.mix")).apply(backbone)
    inputs = inputs_for(backbone, WORDS)
    backbone(inputs).features.cognition[0, 0].backward()
    reached = {name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".lora_B")[0][-5:] for name in reached} == {"conv2", "k.mix"}


def test_adapters_are_saved_in_pefts_own_format(backbone: Backbone, tmp_path: Path) -> None:
    LoRAConfig(rank=2, modules=("q_proj",)).apply(backbone)
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    save_adapters(backbone, tmp_path)
    expected = backbone(inputs_for(backbone, WORDS)).features.cognition
    backbone.vlm = backbone.vlm.unload()
    assert not torch.allclose(backbone(inputs_for(backbone, WORDS)).features.cognition, expected)
    backbone.vlm = peft.PeftModel.from_pretrained(backbone.vlm, tmp_path)
    torch.testing.assert_close(backbone(inputs_for(backbone, WORDS)).features.cognition, expected)


def test_tiny_is_saved_and_loaded_like_any_hugging_face_model(tmp_path: Path) -> None:
    backbone = TinyConfig(width=32, heads=2, trunk_channels=8).build(5, 1, 28).eval()
    backbone.calibrate(torch.rand(3, 28, 28) * 255)
    backbone.vlm.save_pretrained(tmp_path)
    loaded = TinyConfig(pretrained=tmp_path).build(5, 1, 28).eval()
    assert isinstance(loaded.vlm, TinyVLM)
    inputs = inputs_for(backbone, WORDS)
    torch.testing.assert_close(loaded(inputs).features.cognition, backbone(inputs).features.cognition)


def test_activation_checkpoints_run_a_layer_again_and_change_no_gradient(backbone: Backbone) -> None:
    LoRAConfig(rank=2, modules=("q_proj", "v_proj")).apply(backbone)
    layer, calls = backbone.language_layers()[-2], dict.fromkeys(("layer", "inside"), 0)

    def count(key: str) -> Callable[..., None]:
        return lambda *_: calls.update({key: calls[key] + 1})

    layer.register_forward_hook(count("layer"))
    next(m for n, m in layer.named_modules() if n.endswith("q_proj")).register_forward_hook(count("inside"))

    def gradients() -> dict[str, torch.Tensor]:
        backbone.train().zero_grad()
        backbone(inputs_for(backbone, WORDS)).features.cognition.square()[:, ::2].sum().backward()
        return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.requires_grad}

    whole = gradients()
    assert calls == {"layer": 1, "inside": 1}
    backbone.checkpoint_activations()
    again = gradients()
    assert calls == {"layer": 2, "inside": 3}
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert any(value.any() for value in whole.values())
    backbone.eval()(inputs_for(backbone, WORDS)).features.cognition.sum().backward()
    assert calls == {"layer": 3, "inside": 4}, "none outside of training"


def test_unknown_weights_and_modules_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone\.pretrained .* cannot be loaded"):
        PaliGemmaConfig(str(tmp_path / "nothing")).build(5, 1, 28)
    with pytest.raises(ValueError, match="does not have"):
        LoRAConfig(modules=("qq_proj",)).apply(TinyConfig().build(5, 1, 28))
    with pytest.raises(ValueError, match="6 language layers"):
        LoRAConfig(last_layers=9).apply(TinyConfig().build(5, 1, 28))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "at least 1"),
        ({"width": 30}, "multiple"),
        ({"type": "paligemma", "prompt": "go"}, "instruction"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(draccus.utils.ParsingError) as refused:
        draccus.decode(BackboneConfig, {"type": "tiny", **settings})
    assert message in f"{refused.value} {refused.value.__cause__} {refused.value.__context__}"


def test_tiny_may_have_few_layers() -> None:
    backbone = TinyConfig(width=32, heads=2, layers=2, trunk_channels=8).build(5, 1, 28)
    assert len(backbone(inputs_for(backbone, WORDS)).hidden_states) == 3


def test_tiny_takes_longer_prompts_where_it_is_told_to() -> None:
    words = "put both the avocado dip and the zucchini in the hamper"
    backbone = TinyConfig(max_prompt_tokens=64).build(proprio_dim=5, num_views=1, image_size=28)
    assert backbone.max_prompt_tokens == 64
    assert 16 < len(backbone.tokenize(words)) <= 64, "words that neither Recall nor LIBERO has are spelled"
    for wrong in (1, 65):
        with pytest.raises(ValueError, match=f"max_prompt_tokens is {wrong}; tiny takes 2 to 64"):
            TinyConfig(max_prompt_tokens=wrong)


@pytest.mark.parametrize("side", [96, 100])
def test_the_residual_trunk_takes_pictures_of_any_side(side: int) -> None:
    trunk = ResidualTrunk(side, num_views=2, channels=16, blocks=1, condition=8)
    cells, keypoints = trunk(torch.zeros(3, 2, side, side, 3, dtype=torch.uint8), torch.zeros(3, 8))
    assert cells.shape == (3, 2 * (-(-side // 8)) ** 2, 18)
    assert keypoints.shape == (3, 2 * 16 * 3)
