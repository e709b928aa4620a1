"""The `flow` head: RDT2's expert on its recorded weights, pi0's attention, what it reads and when."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipvla.models.features import Features, LayerStates
from ipvla.models.heads.flow import FlowConfig, FlowHead
from ipvla.models.heads.integrators import integrate
from ipvla.models.heads.protocol import masked_mean

RECORDED = load_file(Path(__file__).with_name("rdt2_expert.safetensors"))
DEPTH, WIDTH, KEY_HEADS, SIZE = 3, 32, 2, 8


@dataclass(frozen=True)
class Sizes:
    """What a head needs to know of a backbone: 3 layers, 4 heads of 8, 2 key heads."""

    width: int = 5
    perception_size: int = 6
    num_layers: int = DEPTH
    heads: int = 4
    key_heads: int = KEY_HEADS
    cache_size: int = KEY_HEADS * SIZE


def recorded_features() -> Features:
    """The recorded keys, values and state; cognition and visual tokens, which RDT2 has not, are random."""
    random = torch.Generator().manual_seed(0)

    def flat(name: str) -> torch.Tensor:
        layers = [RECORDED[f"{name}{layer}"].transpose(1, 2).flatten(2) for layer in range(DEPTH)]
        return torch.stack(layers, 1)

    keys, values = flat("k"), flat("v")
    return Features(
        torch.randn(2, 5, generator=random),
        torch.randn(2, 4, 6, generator=random),
        RECORDED["state"][:, 0],
        LayerStates(keys[..., :0], keys, values, RECORDED["mask"]),
    )


def rdt2_weights(head: FlowHead) -> dict[str, torch.Tensor]:
    """The recorded weights by this head's names; those of the glimpse stay as they are, and what reads it is 0."""
    w = {name.removeprefix("weights/"): value for name, value in RECORDED.items() if name.startswith("weights/")}
    named = dict(head.state_dict())

    def take(ours: str, theirs: str, kinds: tuple[str, ...] = ("weight",)) -> None:
        for kind in kinds:
            named[f"{ours}.{kind}"] = w[f"{theirs}.{kind}"]

    both = ("weight", "bias")
    for layer in (0, 2, 4):
        take(f"action_in.{layer}", f"act_adaptor.{layer}", both)
        take(f"state_in.{layer}", f"state_adaptor.{layer}", both)
    named["state_in.4.bias"] = named["state_in.4.bias"] + w["model.state_pos_emb"].flatten()
    for layer in (0, 2):
        take(f"time_in.layers.{layer}", f"model.t_embedder.mlp.{layer}", both)
    named["registers"], named["positions"] = w["model.register_tokens"][0], w["model.x_pos_emb"][0]

    def widened(weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight, torch.zeros(len(weight), WIDTH)], 1)

    for ours, theirs in [(f"blocks.{i}.modulation", f"model.blocks.{i}.adaLN_modulation.1") for i in range(DEPTH)]:
        named[f"{ours}.weight"], named[f"{ours}.bias"] = widened(w[f"{theirs}.weight"]), w[f"{theirs}.bias"]
    named["modulation.weight"] = widened(w["model.final_layer.adaLN_modulation.1.weight"])
    named["modulation.bias"] = w["model.final_layer.adaLN_modulation.1.bias"]
    take("norm", "model.final_layer.ffn_norm")
    take("action_out.0", "model.final_layer.ffn.fc1", both)
    take("action_out.2", "model.final_layer.ffn.fc2", both)
    for i in range(DEPTH):
        ours, theirs = f"blocks.{i}", f"model.blocks.{i}"
        for place, norm in enumerate(("attn_norm", "cross_norm", "ffn_norm")):
            take(f"{ours}.norms.{place}", f"{theirs}.{norm}")
        for part, source in (("own", "attn"), ("cross", "cross_attn")):
            take(f"{ours}.{part}.query", f"{theirs}.{source}.wq")
            take(f"{ours}.{part}.query_norm", f"{theirs}.{source}.norm_q")
            take(f"{ours}.{part}.out", f"{theirs}.{source}.wo")
        take(f"{ours}.own.key_norm", f"{theirs}.attn.norm_k")
        # keys and values alternate there, and follow one another here
        alternating = w[f"{theirs}.attn.wkv.weight"].unflatten(0, (-1, 2))
        named[f"{ours}.own.key_value.weight"] = alternating.transpose(0, 1).flatten(0, 1)
        for part, source in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            take(f"{ours}.{part}", f"{theirs}.ffn.{source}")
    return named


@pytest.fixture
def rdt2() -> FlowHead:
    torch.manual_seed(0)
    head = FlowConfig(hidden=WIDTH, time_scale=1.0).build(Sizes(), 8, 8, 7)  # type: ignore[arg-type]
    head.load_state_dict(rdt2_weights(head))
    return head


class TestRDT2sExpert:
    def test_velocity_loss_and_gradients(self, rdt2: FlowHead) -> None:
        conditions = rdt2.conditions(recorded_features())
        x, t, noise, actions = (RECORDED[name] for name in ("x_t", "t", "noise", "actions"))
        v = rdt2.velocity(x, t, conditions)
        torch.testing.assert_close(v, RECORDED["velocity"], rtol=0, atol=1e-5)
        first = rdt2.velocity(noise, torch.zeros(2), conditions)
        torch.testing.assert_close(first, RECORDED["velocity_t0"], rtol=0, atol=1e-5)
        loss = masked_mean((v - (actions - noise)).square(), torch.ones_like(actions, dtype=torch.bool))
        torch.testing.assert_close(loss, RECORDED["loss"], rtol=0, atol=1e-5)
        loss.backward()
        names = {
            "action_in.0.weight": "act_adaptor.0.weight",
            "blocks.0.cross.query.weight": "model.blocks.0.cross_attn.wq.weight",
            "blocks.2.modulation.bias": "model.blocks.2.adaLN_modulation.1.bias",
            "registers": "model.register_tokens",
            "state_in.4.bias": "state_adaptor.4.bias",
        }
        for ours, theirs in names.items():
            expected = RECORDED[f"grad/{theirs}"].squeeze(0)
            torch.testing.assert_close(rdt2.get_parameter(ours).grad, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 2, 5, 10])
    def test_chunks(self, rdt2: FlowHead, steps: int) -> None:
        conditions = rdt2.conditions(recorded_features())
        chunk = integrate(
            lambda x, t: rdt2.velocity(x, torch.full((2,), t), conditions), RECORDED["noise"], steps, "euler"
        )
        torch.testing.assert_close(chunk, RECORDED[f"sample_{steps}"], rtol=0, atol=1e-4)

    def test_what_stands_on_padding_has_no_influence(self, rdt2: FlowHead) -> None:
        features = recorded_features()
        assert features.layers is not None
        hidden = ~features.layers.valid
        v = rdt2.velocity(RECORDED["x_t"], RECORDED["t"], rdt2.conditions(features))
        for states in (features.layers.keys, features.layers.values):
            states.masked_fill_(hidden[:, None, :, None], 7.0)
        again = rdt2.velocity(RECORDED["x_t"], RECORDED["t"], rdt2.conditions(features))
        assert torch.equal(v, again)
        features.layers.keys[:] = features.layers.keys[:, :1].clone()
        features.layers.values[:] = features.layers.values[:, :1].clone()
        other = rdt2.velocity(RECORDED["x_t"], RECORDED["t"], rdt2.conditions(features))
        assert (other - v).abs().max() > 0.05, "each block reads a layer of its own"


@pytest.mark.parametrize("attention", ["cross", "shared"])
def test_it_starts_at_velocity_zero_and_every_action_sees_every_other(attention: str) -> None:
    torch.manual_seed(0)
    config = FlowConfig(hidden=16, heads=2, attention=attention)  # type: ignore[arg-type]
    head = config.build(Sizes(), 8, 4, 3)  # type: ignore[arg-type]
    conditions, x, t = head.conditions(recorded_features()), torch.randn(2, 4, 3), torch.rand(2)
    assert not head.velocity(x, t, conditions).any()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    conditions, moved = head.conditions(recorded_features()), x.clone()
    moved[:, 2] += 1
    change = head.velocity(moved, t, conditions) - head.velocity(x, t, conditions)
    assert change.abs().amax(-1).gt(1e-4).all()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.heads is 3; the backbone has 2 key heads, give a multiple"):
        FlowConfig(heads=3).build(Sizes(), 8, 4, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"head\.layers is empty"):
        FlowConfig(layers=())
    with pytest.raises(ValueError, match=r"head\.attention is 'both'; choose cross or shared"):
        FlowConfig(attention="both")  # type: ignore[arg-type]
