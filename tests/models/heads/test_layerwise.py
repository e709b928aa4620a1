"""The `layerwise` head: the public one on its recorded weights, in both of its ways; learned routing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipvla.models.features import Features, LayerStates
from ipvla.models.heads.integrators import integrate
from ipvla.models.heads.layerwise import LayerwiseConfig, LayerwiseHead
from ipvla.models.heads.protocol import masked_mean
from ipvla.models.heads.routing import Routes, RoutingConfig

HERE = Path(__file__).parent
RECORDED = {
    name: value
    for file in ("layerwise_fm.safetensors", "layerwise_fm_ends.safetensors")
    for name, value in load_file(HERE / file).items()
}
DEPTH, WIDTH = 4, 32
WAYS = {"interleaved": "odd", "all_cross": "none"}


@dataclass(frozen=True)
class Sizes:
    """What a head needs to know of a backbone."""

    width: int = WIDTH
    perception_size: int = 6
    num_layers: int = DEPTH
    heads: int = 2
    cache_size: int = WIDTH


def recorded_features(masked: bool = True, state: bool = True) -> Features:
    """The recorded layers and state; cognition and visual tokens, which the public head has not, are random."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.stack([RECORDED[f"h{layer}"] for layer in range(DEPTH)], 1)
    return Features(
        torch.randn(2, WIDTH, generator=random),
        torch.randn(2, 4, 6, generator=random),
        RECORDED["state"][:, 0, : 8 if state else 0],
        LayerStates(hidden, hidden[:, :0], hidden[:, :0], RECORDED["mask"] if masked else RECORDED["mask"] | True),
    )


def public(way: str, state: bool = True) -> LayerwiseHead:
    """With the recorded weights; what memory adds is 0."""
    config = LayerwiseConfig(
        WIDTH, heads=2, self_attention=WAYS[way], future_tokens=4, mlp=1024, context_norm=False
    )
    head = config.build(Sizes(), 8 if state else 0, 8, 7)  # type: ignore[arg-type]
    w = {name.removeprefix("weights/"): value for name, value in RECORDED.items() if name.startswith("weights/")}
    named = head.state_dict()

    def take(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in named:
                named[f"{ours}.{kind}"] = w[f"{theirs}.{kind}"]

    for place, name in enumerate(("first", "second", "third"), 1):
        take(f"action_in.{name}", f"action_encoder.layer{place}")
    for place, layer in enumerate((0, 2), 1):
        take(f"state_in.{layer}", f"state_encoder.layer{place}")
        take(f"action_out.{layer}", f"action_decoder.layer{place}")
        take(f"time_in.layers.{layer}", f"model.timestep_encoder.timestep_embedder.linear_{place}")
    named["positions"] = w["position_embedding.weight"][:8]
    if "future" in named:
        named["future"] = w["future_tokens.weight"]
    for kind in ("weight", "bias"):
        named[f"remembered.{kind}"] = torch.zeros_like(named[f"remembered.{kind}"])
    for i in range(DEPTH):
        ours, theirs = f"blocks.{i}", f"model.transformer_blocks.{i}"
        attention = "own" if f"{ours}.own.query.weight" in named else "cross"
        for part, source in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0")):
            take(f"{ours}.{attention}.{part}", f"{theirs}.attn1.{source}")
        take(f"{ours}.modulation", f"{theirs}.norm1.linear")
        take(f"{ours}.mlp.0", f"{theirs}.ff.net.0.proj")
        take(f"{ours}.mlp.2", f"{theirs}.ff.net.2")
    head.load_state_dict(named)
    return head


@pytest.mark.parametrize("way", WAYS)
class TestThePublicHead:
    def test_velocity_loss_and_gradients(self, way: str) -> None:
        head = public(way)
        x, t, noise, actions = (RECORDED[name] for name in ("x_t", "t", "noise", "actions"))
        v = head.velocity(x, t, head.conditions(recorded_features()))
        torch.testing.assert_close(v, RECORDED[f"{way}/velocity"], rtol=0, atol=1e-5)
        loss = masked_mean((v - (actions - noise)).square(), torch.ones_like(actions, dtype=torch.bool))
        torch.testing.assert_close(loss, RECORDED[f"{way}/loss"], rtol=0, atol=1e-5)
        loss.backward()
        names = {
            "action_in.first.weight": "action_encoder.layer1.weight",
            "time_in.layers.0.bias": "model.timestep_encoder.timestep_embedder.linear_1.bias",
            "blocks.0.cross.key.weight": "model.transformer_blocks.0.attn1.to_k.weight",
            "blocks.1.mlp.2.bias": "model.transformer_blocks.1.ff.net.2.bias",
        }
        for ours, theirs in names.items():
            expected = RECORDED[f"{way}/grad/{theirs}"]
            torch.testing.assert_close(head.get_parameter(ours).grad, expected, rtol=0, atol=1e-5)

    def test_without_padding_and_without_state(self, way: str) -> None:
        x, t = RECORDED["x_t"], RECORDED["t"]
        head = public(way)
        v = head.velocity(x, t, head.conditions(recorded_features(masked=False)))
        torch.testing.assert_close(v, RECORDED[f"{way}/velocity_no_mask"], rtol=0, atol=1e-5)
        head = public(way, state=False)
        v = head.velocity(x, t, head.conditions(recorded_features(state=False)))
        torch.testing.assert_close(v, RECORDED[f"{way}/velocity_no_state"], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 2, 4, 10])
    def test_chunks(self, way: str, steps: int) -> None:
        head = public(way)
        conditions = head.conditions(recorded_features())
        chunk = integrate(
            lambda x, t: head.velocity(x, torch.full((2,), t), conditions), RECORDED["noise"], steps, "euler"
        )
        torch.testing.assert_close(chunk, RECORDED[f"{way}/sample_{steps}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("way", "seen"), [("every", True), ("odd", True), ("none", False)])
def test_whether_an_action_sees_the_others_and_the_state(way: str, seen: bool) -> None:
    torch.manual_seed(0)
    head = LayerwiseConfig(WIDTH, self_attention=way).build(Sizes(), 8, 8, 7)  # type: ignore[arg-type]
    features, x, t = recorded_features(), RECORDED["x_t"], RECORDED["t"]
    conditions = head.conditions(features)
    v, moved = head.velocity(x, t, conditions), x.clone()
    moved[:, 5] += 1
    change = (head.velocity(moved, t, conditions) - v).abs().amax(-1)
    others = torch.arange(8) != 5
    assert change[:, 5].gt(1e-3).all()
    assert bool(change[:, others].gt(1e-5).all()) is seen
    assert bool(change[:, others].any()) is seen


ROUTINGS = [RoutingConfig("static"), RoutingConfig("sample"), RoutingConfig("topk", k=2)]
MAP = (2, 4, 4)


def routed(routing: RoutingConfig) -> LayerwiseHead:
    torch.manual_seed(0)
    config = LayerwiseConfig(WIDTH, layers=MAP, routing=routing)
    return config.build(Sizes(), 8, 8, 7)  # type: ignore[arg-type]


def layers_as_read(head: LayerwiseHead) -> Features:
    """The recorded features with the layers that this head asks for."""
    features = recorded_features()
    assert features.layers is not None
    return replace(
        features, layers=replace(features.layers, hidden=features.layers.hidden[:, [i - 1 for i in head.read]])
    )


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.type)
class TestLearnedRouting:
    def test_it_starts_as_the_fixed_map(self, routing: RoutingConfig) -> None:
        fixed, head = routed(RoutingConfig()), routed(routing)
        assert fixed.read == MAP
        assert head.read == (1, 2, 3, 4)
        missing, unexpected = head.load_state_dict(fixed.state_dict(), strict=False)
        assert not unexpected
        assert all(name.startswith("routing.") for name in missing)
        x, t = RECORDED["x_t"], RECORDED["t"]
        v = [one.velocity(x, t, one.conditions(layers_as_read(one))) for one in (fixed, head)]
        torch.testing.assert_close(v[0], v[1], rtol=0, atol=1e-6)

    def test_it_learns_to_read_the_layer_that_tells(self, routing: RoutingConfig) -> None:
        """The actions stand in layer 3, which the map does not read."""
        head, random = routed(replace(routing, balance=0.0)), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        features = layers_as_read(head)
        assert features.layers is not None
        for _ in range(120):
            hidden = torch.randn(8, 4, 6, WIDTH, generator=random)
            sign = torch.where(torch.rand(8, generator=random) < 0.5, -1.0, 1.0)
            hidden[:, 2, :, 0] = 6 * sign[:, None]
            batch = Features(
                torch.zeros(8, WIDTH),
                torch.zeros(8, 4, 6),
                torch.zeros(8, 8),
                LayerStates(hidden, hidden[:, :0], hidden[:, :0], torch.ones(8, 6, dtype=torch.bool)),
            )
            actions = sign[:, None, None].expand(8, 8, 7)
            noise = torch.randn(8, 1, 57, generator=random)
            optimizer.zero_grad()
            head.loss(batch, actions, torch.ones_like(actions, dtype=torch.bool), noise).backward()
            optimizer.step()
        told = {name: float(value) for name, value in head.terms.items()}
        assert max(told[f"routing/{block}/3"] for block in range(3)) > 0.1
        for block in range(3):
            assert sum(told[f"routing/{block}/{layer}"] for layer in (1, 2, 3, 4)) == pytest.approx(1, abs=1e-5)
        assert 0 < told["routing/entropy"] <= torch.tensor(4.0).log()

    def test_weights_are_a_distribution_whatever_was_learned(self, routing: RoutingConfig) -> None:
        head = routed(routing)
        for parameter in head.routing.parameters():
            torch.nn.init.normal_(parameter, std=2.0)
        routes = head.conditions(layers_as_read(head)).routes
        assert routes is not None
        assert routes.weights.min() >= 0
        torch.testing.assert_close(routes.weights.sum(-1), torch.ones(2, 3))
        if routing.type == "topk":  # and perhaps the map's own
            assert (routes.weights > 0).sum(-1).max() <= routing.k + 1


def test_the_balance_is_least_when_all_layers_are_used_alike() -> None:
    rows, one, alike = torch.tensor([True, True, False]), torch.zeros(3, 2, 4), torch.full((3, 2, 4), 0.25)
    one[..., 1] = 1
    one[2] = torch.eye(4)[0]  # does not count
    assert float(Routes(one, one).balance(rows)) == pytest.approx(4)
    assert float(Routes(alike, alike).balance(rows)) == pytest.approx(1)
    assert Routes(one).entropy == 0
    torch.testing.assert_close(Routes(alike).entropy, torch.tensor(4.0).log())


def test_bad_settings_are_refused() -> None:
    def build(**settings: object) -> None:
        LayerwiseConfig(WIDTH, **settings).build(Sizes(), 8, 8, 7)  # type: ignore[arg-type]

    with pytest.raises(
        ValueError, match=r"model\.head reads hidden \[5\], and the backbone has 4 language layers"
    ):
        build(layers=(1, 5))
    with pytest.raises(ValueError, match=r"head\.routing\.k is 5, and only 4 layers are read; lower it"):
        build(routing=RoutingConfig("topk", k=5))
    with pytest.raises(
        ValueError, match=r"head\.layers names \[0\], and head\.routing mixes the outputs of layers"
    ):
        build(layers=(0, 1), routing=RoutingConfig("static"))
    with pytest.raises(ValueError, match=r"head\.routing\.type: 'statik' is unknown; did you mean 'static'\?"):
        RoutingConfig("statik")
    with pytest.raises(ValueError, match=r"head\.hidden is 30; it must be even and a multiple of head\.heads 4"):
        LayerwiseConfig(30)
    with pytest.raises(ValueError, match=r"head\.self_attention: 'all' is unknown"):
        LayerwiseConfig(WIDTH, self_attention="all")
