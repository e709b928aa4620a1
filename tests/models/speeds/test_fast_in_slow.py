"""The last layers as the fast part: what they read, what their loss rests on, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ipvla.models.backbones import PaliGemmaConfig, TinyConfig
from ipvla.models.features import Reads
from ipvla.models.heads import RegressionConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.models.speeds import FastInSlowConfig
from ipvla.models.speeds.fast_in_slow import LastLayers, without_instruction
from ipvla.models.vla import IPVLAConfig
from tests.models.speeds.made_up import GRU, model, play, seen, two, window

FORM = FastInSlowConfig(period=4, staleness=8, layers=2)


def test_the_last_layers_alone_go_on_from_the_states_before_them() -> None:
    """Split after the first of three layers, with the first tokens' keys and values kept, or in one piece."""
    backbone = TinyConfig(width=32, heads=2, layers=3, mlp=32, trunk_channels=8).build(5, 1, 28).eval()
    backbone.reads = Reads(hidden=(0, 1), keys_values=(1, 2))
    past = backbone(seen(model(FORM), 2)).features.layers
    assert past is not None
    tokens, every = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.bool)
    whole = replace(past, keys=past.keys, values=past.values)
    split = backbone.last_layers(tokens, every, whole)
    longer, valid = torch.cat([past.hidden[:, 1], tokens], 1), torch.cat([past.valid, every], 1)
    blind = torch.cat([past.valid, torch.zeros_like(every)], 1)[:, None].expand(-1, past.valid.shape[1], -1)
    mask = torch.cat([blind, valid[:, None].expand(-1, 4, -1)], 1)
    together = backbone.network.norm(backbone.network.run(longer, mask[:, None], None, 1)[-1])
    torch.testing.assert_close(split, together[:, -4:], rtol=1e-4, atol=1e-5)


def test_what_is_kept_is_the_slow_pass_own_last_layers_padded() -> None:
    policy = model(FORM)
    _, (memory,) = play(policy, [0])
    layers = policy.backbone(seen(policy, 1, 0)).features.layers
    assert layers is not None
    tokens = layers.valid.shape[1]
    torch.testing.assert_close(memory["held/keys"][:, :, :tokens], layers.keys)
    assert memory["held/keys"].shape[2] == policy.backbone.max_observation_tokens
    assert not memory["held/valid"][:, tokens:].any()


def test_padding_of_what_is_kept_changes_nothing() -> None:
    policy = model(FORM)
    _, (memory,) = play(policy, [0])
    noise = torch.randn_like(memory["held/keys"]) * ~memory["held/valid"][:, None, :, None]
    noisy = {**memory, "held/keys": memory["held/keys"] + noise, "held/values": memory["held/values"] + noise}
    now = torch.tensor([2])
    expected = policy.act(seen(policy, 1, 2), memory, now)[0]
    torch.testing.assert_close(policy.act(seen(policy, 1, 2), noisy, now)[0], expected)
    moved = {**memory, "held/values": memory["held/values"] + 1}
    assert (policy.act(seen(policy, 1, 2), moved, now)[0] - expected).abs().max() > 1e-4


def test_the_fast_part_puts_all_but_the_instruction_through_its_layers() -> None:
    policy = model(FORM)
    embedded = policy.backbone.embed(seen(policy, 3))
    tokens, valid = without_instruction(embedded)
    assert valid.all()
    assert tokens.shape[1] == policy.backbone.network.text_start + 1, "pictures, state and <act>"
    rows = torch.arange(3)
    assert torch.equal(tokens[:, -1], embedded.tokens[rows, embedded.last])


def test_the_slow_parts_own_loss_rests_on_nothing_that_the_fast_part_sees() -> None:
    """The public program's slow targets read the noised true action. Here they cannot read the present at all."""
    policy = model(FORM, NoMemoryConfig())
    batch = window(policy, lanes=2, steps=4)
    speeds = two(policy)
    assert isinstance(speeds.fast, LastLayers)
    thinks = torch.zeros(2, 4, dtype=torch.bool)
    thinks[:, 0] = True

    def own_loss(shown: torch.Tensor) -> torch.Tensor:
        changed = replace(batch, inputs=replace(batch.inputs, images=shown))
        features, _, _ = speeds.slow.window(policy.backbone, replace(changed, valid=thinks), {})
        loss = speeds.fast.thinking_loss(features, changed, thinks)
        assert loss is not None
        return loss

    later = batch.inputs.images.clone()
    later[:, 1:] = 255 - later[:, 1:]
    torch.testing.assert_close(own_loss(later), own_loss(batch.inputs.images))
    first = batch.inputs.images.clone()
    first[:, :1] = 255 - first[:, :1]
    assert (own_loss(first) - own_loss(batch.inputs.images)).abs() > 1e-6


def test_the_slow_parts_loss_can_be_left_out() -> None:
    for weight, more in ((1.0, True), (0.0, False)):
        policy = model(replace(FORM, slow_weight=weight))
        _, _, own = two(policy).window(policy.backbone, window(policy), policy.initial_memory(3))
        assert (own is not None) == more


def test_memory_reaches_the_actions_through_the_slow_cognition() -> None:
    policy = model(FORM, GRU)
    memory = policy.initial_memory(1)
    with torch.no_grad():
        policy.memory.slow.out.weight.normal_()
    remembering = {**memory, "slow/hidden": torch.randn_like(memory["slow/hidden"])}
    first = torch.zeros(1, dtype=torch.long)
    actions = [policy.act(seen(policy, 1), state, first)[0] for state in (memory, remembering)]
    assert (actions[0] - actions[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speeds": replace(FORM, layers=3)}, "the backbone has 3: a fast part without a slow one"),
        ({"backbone": PaliGemmaConfig("none")}, r"model\.backbone\.type paligemma cannot; choose tiny, or"),
    ],
)
def test_a_backbone_that_cannot_be_split_so_is_refused(changes: dict[str, object], message: str) -> None:
    config = IPVLAConfig(backbone=TinyConfig(layers=3), head=RegressionConfig(), speeds=FORM)
    with pytest.raises(ValueError, match=message) as refused:
        replace(config, **changes)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
