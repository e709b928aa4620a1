"""Frozen layers in 4 bits by bitsandbytes: the same numbers after saving, and adapters that learn on top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load, save
from torch import nn

from ipvla.experiment import ExperimentConfig
from ipvla.forgetting import (
    CorDAConfig,
    DistillationConfig,
    EWCConfig,
    GPMConfig,
    HSWConfig,
    InputDecayConfig,
    L2SPConfig,
    MethodConfig,
    ProjectedUpdateConfig,
    RoutedMomentsConfig,
    TwoSidedConfig,
)
from ipvla.forgetting.fisher import FisherConfig
from ipvla.forgetting.icsm import ICSMConfig
from ipvla.models.adapters import LoRAConfig, OSFConfig, adapters, merge_adapters
from ipvla.models.backbones import Backbone
from ipvla.models.nf4 import NF4Config, parameter_count, quantised
from ipvla.models.nf4_linear import NF4Linear
from ipvla.models.vla import IPVLAConfig, adopt
from ipvla.policy import Policy
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.parallel import World
from ray_jobs.subspaces import SubspacesConfig, read_teacher
from tests.models.conftest import inputs_for
from tests.training.fine_tuning import PROBE, SENSITIVE, equal, finish, protected, trained, tuned, weights

__all__ = ["tuned"]
WORDS = ["press the red button", "which is lit"]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (33, 6)], ids=["whole blocks", "a broken block"])
def test_a_layer_computes_as_bitsandbytes_own(double: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(*shape[::-1])
    theirs = Linear4bit(*shape[::-1], compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4")
    theirs.load_state_dict(plain.state_dict())
    theirs, ours = theirs.to("cpu"), NF4Linear(plain, double, torch.float32)
    x = torch.randn(5, shape[1], requires_grad=True)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x), ours.dequantised()(x)), "the numbers that the bits stand for"
    assert not torch.allclose(ours(x), plain(x), atol=1e-3)
    (gradient,) = torch.autograd.grad(ours(x).sum(), x)
    torch.testing.assert_close(gradient, ours.dequantised().weight.sum(0).expand(5, -1))
    # once it has answered in evaluation, it still carries gradients
    with torch.inference_mode():
        ours.eval()(x)
    assert torch.equal(torch.autograd.grad(ours.train()(x).sum(), x)[0], gradient)


@pytest.mark.parametrize("double", [True, False])
def test_bits_are_loaded_as_they_were_saved(double: bool) -> None:
    torch.manual_seed(0)
    saved = NF4Linear(nn.Linear(64, 96), double, torch.float32)
    file = save(saved.state_dict())
    with torch.device("meta"):
        place = NF4Linear(nn.Linear(64, 96), double, torch.float32)
    other = NF4Linear(nn.Linear(64, 96), double, torch.float32)
    for layer in (place, other):
        described = {name: (x.shape, x.dtype) for name, x in layer.state_dict().items()}
        assert described == {name: (x.shape, x.dtype) for name, x in saved.state_dict().items()}
        adopt(layer, load(file))
        assert all(torch.equal(x, saved.state_dict()[name]) for name, x in layer.state_dict().items())
        x = torch.randn(3, 64)
        assert torch.equal(layer(x), saved(x))
        assert not any(p.requires_grad for p in layer.parameters())
    missing = {name: x for name, x in load(file).items() if name != "weight.absmax"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight\.absmax"'):
        other.load_state_dict(missing)


@pytest.mark.parametrize("towers", [False, True])
def test_every_backbone(backbone: Backbone, towers: bool) -> None:
    inputs = inputs_for(backbone, WORDS)
    plain = backbone(inputs).hidden_states
    count, embedding = parameter_count(backbone), {n for n, _ in backbone.vlm.named_parameters() if "embed" in n}
    linear = {n for n, m in backbone.vlm.named_modules() if type(m) is nn.Linear}
    NF4Config(towers=towers).apply(backbone)
    layers = set(quantised(backbone.vlm))
    assert layers <= linear
    inside = {m for layer in backbone.language_layers() for m in layer.modules()}
    every = {n for n in linear if not n.endswith("lm_head") and n != "proprio.0"}  # which has 5 columns
    assert layers == every if towers else {m for _, m in quantised(backbone.vlm).items()} < inside
    assert towers or not any(type(m) is nn.Linear for m in inside)
    assert embedding == {n for n, _ in backbone.vlm.named_parameters() if "embed" in n and "absmax" not in n}
    assert parameter_count(backbone) == count
    bits = backbone(inputs).hidden_states
    for a, b in zip(plain[1:], bits[1:], strict=True):
        assert 0 < (a - b).norm() / a.norm() < 0.5
    NF4Config(towers=towers).apply(backbone)  # nothing is left to do
    assert all(torch.equal(a, b) for a, b in zip(bits, backbone(inputs).hidden_states, strict=True))


def test_adapters_on_every_backbone(backbone: Backbone) -> None:
    """Their gradients alone; merged, the numbers of the bits and what was learned."""
    NF4Config().apply(backbone)
    LoRAConfig(rank=2).apply(backbone)
    assert len(adapters(backbone)) == 36
    backbone.train()
    inputs = inputs_for(backbone, WORDS)
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or not name.startswith("vlm.")), name
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    backbone(inputs).features.cognition.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in backbone.named_parameters() if "lora_" in n)
    before = backbone.eval()(inputs).hidden_states
    merge_adapters(backbone)
    assert not quantised(backbone)
    for a, b in zip(before, backbone(inputs).hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.fixture
def packed(tuned: ExperimentConfig) -> ExperimentConfig:
    """`tuned`, its teacher in 4 bits, which the artifact was read from."""
    assert tuned.start_from is not None
    teacher = Policy.load(tuned.start_from)
    NF4Config().apply(teacher.model.backbone)
    directory = tuned.start_from.with_name("packed")
    replace(teacher, config=replace(teacher.config, nf4=NF4Config())).save(directory)
    config = SubspacesConfig(
        storage_root=tuned.root,
        teacher=directory,
        probe=PROBE,
        icsm=ICSMConfig(rank=8, scoring="fisher"),
        adapters=tuned.model.lora,
    )
    read_teacher(config, tuned.artifacts / "icsm_tiny")
    with pytest.raises(ValueError, match="set fisher to null, or read a teacher without"):
        read_teacher(replace(config, fisher=FisherConfig()), tuned.artifacts / "other")
    return replace(tuned, start_from=directory, model=replace(tuned.model, nf4=NF4Config()))


@pytest.mark.parametrize(
    "method",
    [
        HSWConfig(beta=0.5, gamma=0.0),
        InputDecayConfig(lam=1.0),
        GPMConfig(energy=0.5),
        TwoSidedConfig(lam=1.0),
        L2SPConfig(strength=1.0),
        DistillationConfig(weight=1.0, batch=8),
        ProjectedUpdateConfig(beta=0.5, gamma=0.0),
        RoutedMomentsConfig(beta=0.5, gamma=0.0),
    ],
    ids=lambda method: method.get_choice_name(type(method)),
)
def test_protection_on_top(packed: ExperimentConfig, method: MethodConfig) -> None:
    """The teacher's bits stay, adapters learn, and the method changes what they learn."""
    start = weights(packed.build(World()))
    plain, guarded = trained(packed), trained(protected(packed, method))
    assert not equal(plain, guarded)
    for name, value in weights(guarded).items():
        if name.startswith("backbone."):
            assert torch.equal(value, start[name]) == ("lora_" not in name or value.equal(start[name])), name
    assert any("lora_B" in n and not x.equal(start[n]) for n, x in weights(guarded).items())


def test_the_fisher_information_of_ordinary_weights_holds_adapters_on_bits(tuned: ExperimentConfig) -> None:
    config = replace(tuned, model=replace(tuned.model, nf4=NF4Config()))
    assert not equal(trained(config), trained(protected(config, EWCConfig(strength=1.0))))


def test_a_thermostat_begins_at_no_drift(packed: ExperimentConfig) -> None:
    """Teacher and student have the same bits."""
    config = protected(packed, HSWConfig(), thermostat=SENSITIVE)
    state = config.build(World()).state
    assert state.protection is not None
    assert state.protection.regulate(SENSITIVE.every, World())["probe/d"] == pytest.approx(0, abs=1e-6)


def test_a_run_goes_on_from_its_checkpoint(packed: ExperimentConfig, tmp_path: Path) -> None:
    whole = trained(packed)
    half = replace(packed, training=replace(packed.training, until=3))
    first = trained(half)
    save_checkpoint(tmp_path / "at", first.state, first.policy, World(), packed.identity)
    second = packed.build(World())
    load_checkpoint(tmp_path / "at", second.state, World(), packed.identity)
    finish(second, packed)
    assert equal(whole, second)


def test_refused_settings(tuned: ExperimentConfig) -> None:
    model = replace(tuned.model, nf4=NF4Config())
    for changes, message in (
        ({"model": replace(model, lora=None)}, "nothing adapts them; set model.lora.rank"),
        ({"model": model, "training": replace(tuned.training, sharding="fsdp")}, "fsdp, which model.nf4 cannot"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(tuned, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="corda changes the weights below the adapters"):
        protected(replace(tuned, model=model), CorDAConfig())
    with pytest.raises(ValueError, match="set one of them to null"):
        IPVLAConfig(osf=OSFConfig(), nf4=NF4Config())
    with pytest.raises(ValueError, match="choose one of"):
        NF4Config(compute="int8")


def test_the_next_task_begins_with_what_was_learned(
    packed: ExperimentConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In ordinary numbers; where bits are asked for again, those numbers are rounded once more, which is said."""
    learned = trained(packed).policy
    learned.model.eval()
    learned.save(tmp_path / "learned")
    merged = Policy.load(tmp_path / "learned").merged()
    assert merged.config.nf4 is None
    assert not quantised(merged.model)
    plain = replace(packed, start_from=tmp_path / "learned", model=replace(packed.model, nf4=None))
    begun = plain.build(World()).policy.merged()
    assert all(torch.equal(x, merged.model.state_dict()[n]) for n, x in begun.model.state_dict().items())
    assert "they stay so" in caplog.text
    again = replace(packed, start_from=tmp_path / "learned").build(World()).policy
    assert "they are quantised anew" in caplog.text
    assert quantised(again.model)


def test_half_precision(packed: ExperimentConfig) -> None:
    """Autocast multiplies in its own format; float32 layers of 4 bits compute as they are set."""
    for precision in ("bf16", "fp16"):
        run = trained(replace(packed, training=replace(packed.training, precision=precision)))
        assert all(p.grad is not None for n, p in run.state.model.named_parameters() if "lora_" in n)
