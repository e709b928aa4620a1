"""What holds for every head, in a model with a real backbone and a memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ipvla.models.backbones import PaliGemmaConfig, TinyConfig
from ipvla.models.heads import (
    BinsConfig,
    FlowConfig,
    HeadConfig,
    LayerwiseConfig,
    OFTConfig,
    OpenVLATokensConfig,
    Pi0FastHeadConfig,
    Pi0HeadConfig,
    RegressionConfig,
    ReverseChainConfig,
    TokensConfig,
)
from ipvla.models.heads.integrators import INTEGRATORS
from ipvla.models.heads.protocol import Sampling
from ipvla.models.heads.quality import QualityConfig
from ipvla.models.heads.routing import RoutingConfig
from ipvla.models.memory import GRUMemoryConfig, KVMemoryConfig, LatentMemoryConfig, MemoryConfig
from ipvla.models.vla import IPVLA, IPVLAConfig
from ipvla.types import StepBatch
from tests.models.memory.test_feeding_the_backbone import cut, window

BACKBONE = TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8, layers=3)
CHUNK, ACTIONS = 4, 7
#: The third dimension is constant in the dataset.
VARIES = torch.arange(ACTIONS) != 2
DOCS = Path(__file__).parents[3] / "docs"
EXAMPLE = DOCS / "examples" / "small_flow.py"


def documented() -> HeadConfig:
    """The worked example of docs/heads.md."""
    module: Any = ModuleType("ipvla_documentation_head")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(EXAMPLE.read_text(), str(EXAMPLE), "exec"), module.__dict__)
    config: HeadConfig = module.SmallFlowConfig(16)
    return config


MOVING = QualityConfig(smoothness=0.5, jerk=0.5)
#: The keys and values of `BACKBONE`.
EXPERT: dict[str, Any] = {"layers": 3, "heads": 2, "key_heads": 2, "head_size": 16, "steps": 4}
#: Heads that need a backbone of their own; tests/checkpoints is about them.
ELSEWHERE = {OFTConfig, OpenVLATokensConfig, Pi0FastHeadConfig}
#: Every other head of this folder, in its forms, and the example of how to add one.
HEADS: dict[str, HeadConfig] = {
    "example": documented(),
    "regression": RegressionConfig(16),
    "regression with quality": RegressionConfig(16, quality=MOVING),
    "bins": BinsConfig(16),
    "tokens": TokensConfig(),
    "tokens in parallel": TokensConfig(decoding="parallel"),
    "keyframe first, motions": ReverseChainConfig(16, heads=2, ffn=16, gripper=False),
    "keyframe first, poses": ReverseChainConfig(16, 2, 16, encoder_layers=1, poses="absolute", gripper=False),
    "flow": FlowConfig(16),
    "flow shared": FlowConfig(16, attention="shared", heads=4, layers=(0, -1), time="beta"),
    "flow with draws and quality": FlowConfig(16, draws=3, quality=MOVING, time="logit_normal", integrator="heun"),
    "pi0": Pi0HeadConfig(width=16, mlp=16, dims=8, **EXPERT),
    "pi05": Pi0HeadConfig(variant="pi05", width=16, mlp=16, dims=8, **EXPERT),
    "layerwise": LayerwiseConfig(16, mlp=32),
    "layerwise as published": LayerwiseConfig(16, mlp=32, self_attention="odd", context_norm=False),
    "layerwise without self-attention": LayerwiseConfig(16, mlp=32, self_attention="none", layers=(0, -1)),
    "layerwise, static mix": LayerwiseConfig(16, mlp=32, routing=RoutingConfig("static")),
    "layerwise, mix per sample": LayerwiseConfig(16, mlp=32, layers=(2, 3), routing=RoutingConfig("sample")),
    "layerwise, top k": LayerwiseConfig(16, mlp=32, routing=RoutingConfig("topk", hidden=8), draws=2),
}
every_head = pytest.mark.parametrize("name", HEADS)


def made(head: HeadConfig, memory: MemoryConfig | None = None) -> IPVLA:
    """A model with no weight at zero, as after some training."""
    torch.manual_seed(0)
    config = IPVLAConfig(BACKBONE, memory or GRUMemoryConfig(8), head, chunk=CHUNK)
    model = config.build(VARIES, proprio_dim=5, image_size=28)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def demonstrations(model: IPVLA) -> StepBatch:
    """A window [3, 2] of whose second step the last two actions do not exist."""
    random = torch.Generator().manual_seed(1)
    batch = window(model.backbone, 3, 2)
    actions = torch.rand(3, 2, CHUNK, ACTIONS, generator=random) * 2 - 1
    action_valid = torch.ones(3, 2, CHUNK, dtype=torch.bool)
    action_valid[:, 1, 2:] = False
    return replace(
        batch,
        actions=actions.masked_fill(~VARIES, 0.0),
        action_valid=action_valid,
        noise_seed=torch.arange(6).view(3, 2),
    )


def loss_of(model: IPVLA, batch: StepBatch) -> torch.Tensor:
    loss, _ = model.loss(batch, model.initial_memory(len(batch.t)))
    return loss


def test_all_heads_are_here() -> None:
    ours = {t for n, t in HeadConfig.get_known_choices().items() if t.__module__.startswith("ipvla.")}
    assert {type(config) for config in HEADS.values()} >= ours - ELSEWHERE
    names = {HeadConfig.get_choice_name(config) for config in ours}
    page = (DOCS / "heads.md").read_text()
    assert all(f"`{name}`" in page for name in names)


@every_head
class TestEveryHead:
    def test_a_chunk_depends_on_its_own_episode_alone(self, name: str) -> None:
        model = made(HEADS[name])
        inputs = demonstrations(model).inputs.map(lambda x: x[:, 0])
        t, seeds = torch.zeros(3, dtype=torch.long), [11, 12, 13]
        together, _ = model.act(inputs, model.initial_memory(3), t, seeds)
        assert together.shape == (3, CHUNK, ACTIONS)
        assert together.dtype == torch.float32
        assert torch.isfinite(together).all()
        for row in range(3):
            one = inputs.map(lambda x, r=row: x[r : r + 1])
            alone, _ = model.act(one, model.initial_memory(1), t[:1], seeds[row : row + 1])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)

    def test_the_loss_does_not_see_padding_and_constant_dimensions(self, name: str) -> None:
        model = made(HEADS[name])
        batch = demonstrations(model)
        counted = batch.action_valid[..., None] & VARIES
        other = replace(batch, actions=batch.actions.where(counted, 0.5))
        assert not torch.equal(batch.actions, other.actions)
        assert torch.equal(loss_of(model, batch), loss_of(model, other))
        nothing = replace(batch, action_valid=torch.zeros_like(batch.action_valid))
        assert float(loss_of(model, nothing).detach()) == pytest.approx(0.0)

    def test_the_loss_sees_every_other_action(self, name: str) -> None:
        model = made(HEADS[name])
        batch = demonstrations(model)
        before = loss_of(model, batch)
        for place in (batch.action_valid[..., None] & VARIES).nonzero().tolist()[::7]:
            moved = batch.actions.clone()
            moved[tuple(place)] -= torch.sign(moved[tuple(place)]) * 0.5
            assert not torch.equal(loss_of(model, replace(batch, actions=moved)), before)

    def test_a_gradient_reaches_every_parameter(self, name: str) -> None:
        model = made(HEADS[name])
        loss_of(model, demonstrations(model)).backward()
        without = [n for n, p in model.head.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without
        assert model.memory.get_parameter(next(n for n, _ in model.memory.named_parameters())).grad is not None

    @pytest.mark.parametrize("memory", [GRUMemoryConfig(8), LatentMemoryConfig(2), KVMemoryConfig(2)], ids=str)
    def test_the_past_reaches_the_actions(self, name: str, memory: MemoryConfig) -> None:
        """The same observation after another one has another loss."""
        model = made(HEADS[name], memory)
        with torch.no_grad():
            for parameter in model.memory.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        batch = demonstrations(model)
        t, seeds, losses = torch.zeros(3, dtype=torch.long), [1, 2, 3], list[torch.Tensor]()
        for images in (batch.inputs.images[:, 0], 255 - batch.inputs.images[:, 0]):
            first = replace(batch.inputs.map(lambda x: x[:, 0]), images=images)
            _, remembered = model.act(first, model.initial_memory(3), t, seeds)
            later = replace(cut(batch, (slice(None), slice(1, 2))), is_first=torch.zeros(3, 1, dtype=torch.bool))
            losses.append(model.loss(later, remembered)[0].detach())
        assert (losses[0] - losses[1]).abs() > 1e-6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_gives_nearly_the_same_loss(self, name: str, dtype: torch.dtype) -> None:
        model = made(HEADS[name])
        batch = demonstrations(model)
        exact = float(loss_of(model, batch).detach())
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, batch)
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(exact, rel=0.05)

    def test_a_probe_gets_a_gradient(self, name: str) -> None:
        model = made(HEADS[name])
        batch = demonstrations(model)
        features = model.memory.window(model.backbone, batch, model.initial_memory(3))[0].at(0)
        (gradient,) = torch.autograd.grad(model.expected(features).square().sum(), features.cognition)
        assert gradient.any()

    def test_sampling_settings_have_no_part_in_training(self, name: str) -> None:
        config = HEADS[name]
        if not hasattr(config, "integrator"):
            with pytest.raises(ValueError, match=r"sampling: steps=2, and a head of type \w+ takes no such steps"):
                config.sampled(Sampling(steps=2))
            return
        model = made(config)
        batch = demonstrations(model)
        loss = loss_of(model, batch)
        features = model.memory.window(model.backbone, batch, model.initial_memory(3))[0].at(0)
        chunks = []
        for integrator in INTEGRATORS:
            other = made(config.sampled(Sampling(4, integrator)))
            other.load_state_dict(model.state_dict())
            assert torch.equal(loss_of(other, batch), loss)
            chunks.append(other.sample(features, [1, 2, 3]))
        assert all((chunk - chunks[0]).abs().max() > 1e-6 for chunk in chunks[1:])


@pytest.mark.parametrize(
    "head", [FlowConfig(16, heads=2), FlowConfig(16, attention="shared"), LayerwiseConfig(16, mlp=16)], ids=str
)
def test_a_head_in_float32_reads_the_layers_of_a_backbone_in_bfloat16(
    head: HeadConfig, paligemma_directory: Path
) -> None:
    """Whose one key head serves several heads."""
    torch.manual_seed(0)
    backbone = PaliGemmaConfig(str(paligemma_directory), dtype="bfloat16", max_prompt_tokens=24)
    model = IPVLAConfig(backbone, GRUMemoryConfig(8), head, chunk=CHUNK).build(VARIES, 5, image_size=28).eval()
    assert model.backbone.key_heads == 1
    batch = demonstrations(model)
    loss_of(model, batch).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.head.parameters())
    inputs = batch.inputs.map(lambda x: x[:, 0])
    chunk, _ = model.act(inputs, model.initial_memory(3), torch.zeros(3, dtype=torch.long), [1, 2, 3])
    assert chunk.dtype == torch.float32
    assert torch.isfinite(chunk).all()


def test_constant_dimensions_are_never_noise() -> None:
    model = made(HEADS["flow"])
    batch = demonstrations(model)
    features = model.memory.window(model.backbone, batch, model.initial_memory(3))[0].at(0)
    chunk = model.sample(features, [1, 2, 3])
    assert not chunk[..., 2].any()
    assert chunk[..., VARIES].all()


def test_no_gradient_enters_an_insulated_backbone() -> None:
    model = made(replace(FlowConfig(16), detach=True))
    loss_of(model, demonstrations(model)).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    for part in (model.head, model.memory):
        assert all(p.grad is not None for p in part.parameters())
    with pytest.raises(ValueError, match=r"model\.head\.detach .* model\.memory\.type latent learns through it"):
        made(replace(FlowConfig(16), detach=True), LatentMemoryConfig(2))


def test_several_draws_cost_the_backbone_one_pass() -> None:
    calls = []
    for draws in (1, 4):
        model = made(FlowConfig(16, draws=draws))
        count = [0]
        handle = model.backbone.language_layers()[0].register_forward_hook(lambda *_, c=count: c.append(1))
        loss_of(model, demonstrations(model))
        handle.remove()
        calls.append(len(count))
        assert model.head.loss_noise_shape == (draws, CHUNK * ACTIONS + 1)
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"integrator": "oiler"}, r"head\.integrator: 'oiler' is unknown; did you mean 'euler'\?"),
        ({"steps": 0}, r"head\.steps is 0; it must be at least 1"),
        ({"time": "gauss"}, r"head\.time: 'gauss' is unknown; choose one of: uniform, logit_normal, beta"),
        ({"draws": 0}, r"head\.draws is 0"),
        (
            {"distil": "regresion", "steps": 1},
            r"head\.distil: 'regresion' is unknown; did you mean 'regression'\?",
        ),
        ({"distil": "regression"}, r"head\.steps is 4, head\.integrator euler; set them to 1 and euler"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        FlowConfig(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_quality_that_a_chunk_cannot_have_is_refused() -> None:
    for quality, message in (
        (QualityConfig(jerk=1.0), r"head\.quality\.jerk needs a chunk of 4, and model\.chunk is 3"),
        (QualityConfig(smoothness=1.0, dimensions=(7,)), r"head\.quality\.dimensions: \[7\] do not exist"),
    ):
        config = IPVLAConfig(BACKBONE, GRUMemoryConfig(8), FlowConfig(16, quality=quality), chunk=3)
        with pytest.raises(ValueError, match=message):
            config.build(VARIES, proprio_dim=5, image_size=28)
    with pytest.raises(ValueError, match=r"head\.quality\.jerk is -1; it must be finite and at least 0"):
        QualityConfig(jerk=-1)


def test_quality_is_nothing_for_the_demonstration_itself_and_counts_bends() -> None:
    weight = torch.ones(2, 5, 3, dtype=torch.bool)
    actions = torch.rand(2, 5, 3)
    assert MOVING.loss(actions, actions, weight) == 0
    assert MOVING.loss(actions + 1, actions, weight) < 1e-10, "a shifted movement bends as much"
    line = torch.arange(5.0)[:, None].expand(2, 5, 3)
    bent = line + torch.eye(5, 3)
    expected = torch.diff(torch.eye(5, 3), 2, 0).square().mean()
    torch.testing.assert_close(QualityConfig(smoothness=2.0).loss(bent, line, weight), 2 * expected)
    only = QualityConfig(smoothness=1.0, dimensions=(1,))
    assert only.loss(line + torch.tensor([1.0, 0, 0]) * torch.eye(5, 3), line, weight) == 0
    weight[:, 2] = False
    assert MOVING.loss(torch.rand(2, 5, 3), actions, weight) == 0, "no three actions in a row are left"
