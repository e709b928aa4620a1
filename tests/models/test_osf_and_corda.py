"""PEFT's two ways to spare a teacher by where training begins: the function stays, what may move is chosen."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from ipvla.models.adapters import LoRAConfig, OSFConfig, adapters, begin_by_corda, save_adapters
from ipvla.models.backbones import Backbone, TinyConfig
from ipvla.models.vla import IPVLAConfig
from tests.models.conftest import inputs_for

WORDS = ["press the red button", "press the blue button"]
LORA = LoRAConfig(rank=2, alpha=6, last_layers=4, modules=("q_proj", "down_proj"))
OSF = OSFConfig(effective_rank=0.75, last_layers=4, modules=("q_proj", "down_proj"))


def cognition(backbone: Backbone) -> Tensor:
    return backbone(inputs_for(backbone, WORDS)).features.cognition


def covariances(backbone: Backbone) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, module in LORA.targets(backbone).items():
        x = torch.randn(200, module.in_features, generator=random, dtype=torch.float64)
        found[name] = (
            x.T @ x * torch.linspace(3, 0.1, module.in_features).outer(torch.linspace(3, 0.1, module.in_features))
        )
    return found


def test_osf_leaves_the_function_and_trains_the_small_directions_alone(backbone: Backbone) -> None:
    before, targets = cognition(backbone), OSF.targets(backbone)
    OSF.apply(backbone)
    torch.testing.assert_close(cognition(backbone), before)
    trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * len(targets)
    assert all("osf_svd_params" in name for name in trainable)


def test_osf_keeps_gradients_across_the_frozen_directions() -> None:
    torch.manual_seed(0)
    backbone = TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28)
    weight = OSF.targets(backbone)["layers.4.q_proj"].weight.detach().clone()
    OSF.apply(backbone)
    cognition(backbone).square().sum().backward()
    u, _, vh = torch.linalg.svd(weight)
    kept = int(0.75 * len(u))
    layer = backbone.vlm.base_model.model.layers[4].q_proj.osf_svd_params["default"]
    assert layer["U_low"].grad.abs().max() > 0
    assert (u[:, :kept].T @ layer["U_low"].grad).abs().max() < 1e-5 * layer["U_low"].grad.abs().max()
    assert (layer["V_low"].grad @ vh[:kept].T).abs().max() < 1e-5 * layer["V_low"].grad.abs().max()


def test_what_osf_learned_is_saved_in_pefts_own_format(backbone: Backbone, tmp_path: Path) -> None:
    OSF.apply(backbone)
    for name, p in backbone.named_parameters():
        if p.requires_grad and "S_low" in name:
            p.data.mul_(3)
    save_adapters(backbone, tmp_path)
    expected = cognition(backbone)
    backbone.vlm = backbone.vlm.unload()
    assert not torch.allclose(cognition(backbone), expected)
    backbone.vlm = peft.PeftModel.from_pretrained(backbone.vlm, tmp_path)
    torch.testing.assert_close(cognition(backbone), expected)


def test_corda_leaves_the_function_and_begins_where_the_teachers_inputs_have_least(backbone: Backbone) -> None:
    before, moments = cognition(backbone), covariances(backbone)
    base = {name: module.weight.detach().clone() for name, module in LORA.targets(backbone).items()}
    LORA.apply(backbone)
    begin_by_corda(backbone, moments)
    torch.testing.assert_close(cognition(backbone), before, rtol=1e-4, atol=1e-4)
    frozen = backbone.vlm.get_base_model()
    for name, adapter in adapters(backbone).items():
        started = adapter.scale * adapter.b @ adapter.a
        torch.testing.assert_close(frozen.get_submodule(name).base_layer.weight + started, base[name])
        share = torch.einsum("oi,ij,oj->", started.double(), moments[name], started.double())
        whole = torch.einsum("oi,ij,oj->", base[name].double(), moments[name], base[name].double())
        equal = whole * len(adapter.a) / min(base[name].shape)
        assert share < 0.5 * equal, "less of the output than as many directions have on average"


def test_the_scale_of_a_covariance_is_of_no_matter() -> None:
    started = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        backbone = TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28)
        moments = {name: scale * moment for name, moment in covariances(backbone).items()}
        LORA.apply(backbone)
        begin_by_corda(backbone, moments)
        started.append({name: adapter.b @ adapter.a for name, adapter in adapters(backbone).items()})
    for name, product in started[0].items():
        torch.testing.assert_close(product, started[1][name], rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    def tiny() -> Backbone:
        return TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28)

    for rank in (0.0, 1.0, 3.0):
        with pytest.raises(ValueError, match=r"osf\.effective_rank is .* between 0 and 1"):
            OSFConfig(effective_rank=rank)
    with pytest.raises(ValueError, match=r"osf names \['trunk\.conv1'\], which are not linear"):
        OSFConfig(extra=("trunk.conv1",)).apply(tiny())
    with pytest.raises(ValueError, match=r"osf names \['qq_proj'\]"):
        OSFConfig(modules=("qq_proj",)).apply(tiny())
    with pytest.raises(ValueError, match=r"freezes nothing of a weight with 32 .* at least 0\.032"):
        OSFConfig(effective_rank=0.01).apply(tiny())
    with pytest.raises(ValueError, match=r"model\.lora and model\.osf are both set"):
        IPVLAConfig(lora=LORA, osf=OSF)
    backbone = tiny()
    OSF.apply(backbone)
    with pytest.raises(ValueError, match="adapters are OSF, not LoRA"):
        adapters(backbone)
    backbone, moments = tiny(), covariances(tiny())
    LORA.apply(backbone)
    with pytest.raises(ValueError, match=r"covariance of \S+ is absent"):
        begin_by_corda(backbone, {})
    with pytest.raises(ValueError, match=r"is \[2, 2\], its weight needs \[32, 32\]"):
        begin_by_corda(backbone, {name: torch.eye(2) for name in moments})
    backbone = tiny()
    LoRAConfig(rank=33, last_layers=4, modules=("q_proj",)).apply(backbone)
    with pytest.raises(ValueError, match=r"lora\.rank is 33, but \S+ has 32 singular values"):
        begin_by_corda(backbone, moments)
