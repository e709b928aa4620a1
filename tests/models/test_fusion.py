"""Fusion as a function: what each kind can and cannot know, and that a closed gate changes no bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ipvla.models.backbones import Backbone, BackboneConfig, TinyConfig
from ipvla.models.fusion import (
    AttendFusionConfig,
    Fusion,
    FusionConfig,
    GlobalFusionConfig,
    GridFusionConfig,
    NoFusionConfig,
    encoded,
)
from ipvla.models.vla import IPVLAConfig
from tests.models.conftest import inputs_for

KINDS = (GlobalFusionConfig(), GridFusionConfig(), AttendFusionConfig())
PLACED = KINDS[1:]
WIDTH = 16


def opened(config: FusionConfig, seed: int = 0) -> Fusion:
    torch.manual_seed(seed)
    fusion = config.build(WIDTH)
    assert fusion is not None
    with torch.no_grad():
        fusion.gate.fill_(0.7)
    return fusion


@st.composite
def seen(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and points, some of them unknown."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.integers(2, 12))
    points = torch.rand(2, count, 3, generator=random) * 2
    points[torch.rand(2, count, generator=random) < 0.2] = torch.nan
    return torch.randn(2, count, WIDTH, generator=random), points


@settings(max_examples=20)
@given(seen(), st.sampled_from(KINDS))
def test_behind_a_closed_gate_tokens_are_as_they_were(
    given_: tuple[torch.Tensor, torch.Tensor], config: FusionConfig
):
    tokens, points = given_
    fusion = config.build(WIDTH)
    assert fusion is not None
    out = fusion(tokens, points)
    assert torch.equal(out, tokens)
    out.square().sum().backward()
    if points.isfinite().all(-1).any():
        assert fusion.gate.grad is not None
        assert (fusion.gate.grad != 0).any(), "it can open"


@settings(max_examples=20)
@given(seen(), st.integers(0, 2**31))
def test_permuted_points_cannot_change_global(given_: tuple[torch.Tensor, torch.Tensor], seed: int):
    tokens, points = given_
    order = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(seed))
    fusion = opened(GlobalFusionConfig())
    torch.testing.assert_close(fusion(tokens, points), fusion(tokens, points[:, order]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", PLACED)
def test_permuted_points_change_what_knows_places(config: FusionConfig):
    tokens, points = torch.randn(2, 9, WIDTH), torch.rand(2, 9, 3)
    fusion = opened(config)
    changed = (fusion(tokens, points) - fusion(tokens, points.flip(1))).abs().amax(-1)
    assert (changed[:, [0, 1, 2, 3, 5, 6, 7, 8]] > 1e-3).all(), "every token but the middle one got another point"


def test_attention_reads_near_points_and_grid_reads_its_own():
    tokens, points = torch.randn(1, 6, WIDTH), torch.zeros(1, 6, 3)
    points[0, :, 0] = torch.tensor([0.0, 0.01, 0.02, 5.0, 5.01, 5.02])
    moved = points.clone()
    moved[0, 4, 1] = 0.05
    for config, others in ((AttendFusionConfig(), [3, 5]), (GridFusionConfig(), [])):
        fusion = opened(config)
        change = (fusion(tokens, points) - fusion(tokens, moved)).abs().amax(-1)[0]
        assert (change > 1e-6).nonzero().flatten().tolist() == sorted([4, *others])


@settings(max_examples=20)
@given(seen(), st.sampled_from(PLACED))
def test_a_patch_without_a_point_stays_as_it_is_and_tells_nobody(
    given_: tuple[torch.Tensor, torch.Tensor], config: FusionConfig
):
    tokens, points = given_
    fusion, unknown = opened(config), ~points.isfinite().all(-1)
    out = fusion(tokens, points)
    assert torch.equal(out[unknown], tokens[unknown])
    other = torch.where(unknown[..., None], torch.tensor([torch.nan, 3.0, torch.inf]), points)
    assert torch.equal(fusion(tokens, other), out)


def test_a_count_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="9 points for 4 visual tokens"):
        opened(GridFusionConfig())(torch.randn(1, 4, WIDTH), torch.rand(1, 9, 3))
    with pytest.raises(ValueError, match=r"model\.fusion\.heads is 3, and visual tokens have 16 numbers"):
        AttendFusionConfig(heads=3).build(WIDTH)
    for wrong in ({"hidden": 0}, {"heads": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            AttendFusionConfig(**wrong)


def test_the_encoding_is_ego3ds():
    """SpatialVLA e480753 halves points, relative to 2 m before the camera."""
    reference = load_file(Path(__file__).parents[1] / "geometry.safetensors")
    points = (reference["ego3d/xyz"].unflatten(-1, (4, 3)) - torch.tensor([0.0, 0.0, 2.0])) / 2
    torch.testing.assert_close(encoded(points).flatten(-2), reference["ego3d/encoding"], atol=1e-5, rtol=0)


def fused(config: FusionConfig, backbone: BackboneConfig) -> Backbone:
    torch.manual_seed(0)
    model = IPVLAConfig(backbone, chunk=2, fusion=config).build(torch.ones(7, dtype=torch.bool), 5, 1, 28)
    return model.eval().backbone


@pytest.mark.parametrize("name", ["tiny", "residual", "paligemma", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_a_backbone_begins_as_without_and_then_sees_points(
    backbone_configs: Mapping[str, BackboneConfig], name: str
):
    configs = {**backbone_configs, "residual": TinyConfig(width=32, heads=2, trunk_channels=8, trunk_blocks=1)}
    backbone, without = (fused(config, configs[name]) for config in (GridFusionConfig(), NoFusionConfig()))
    assert without.fusion is None
    assert {n for n in backbone.state_dict() if not n.startswith("fusion.")} == set(without.state_dict())
    inputs = inputs_for(backbone, ["press the red button", "which is lit"])
    with pytest.raises(ValueError, match="give observations with geometry"):
        backbone(inputs)
    side, _ = backbone.patches(1) or (0, 0)
    near = replace(inputs, points=torch.rand(2, 1, side, side, 3))
    features = backbone(near).features
    assert torch.equal(features.cognition, without(inputs).features.cognition)
    assert torch.equal(features.perception, without(inputs).features.perception)
    assert backbone.fusion is not None
    with torch.no_grad():
        backbone.fusion.gate.fill_(1.0)
    assert not torch.equal(backbone(near).features.cognition, features.cognition)
    assert not torch.equal(
        backbone(near).features.cognition, backbone(replace(near, points=near.points + 0.3)).features.cognition
    )


def test_what_cannot_be_fused_is_refused(backbone_configs: Mapping[str, BackboneConfig]):
    with pytest.raises(ValueError, match=r"no square grid of visual tokens .* model\.backbone\.type prismatic"):
        fused(GridFusionConfig(), backbone_configs["prismatic"])
