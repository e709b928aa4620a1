"""Second moments of what linear modules read and of what the output asks of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.module_statistics import ModuleStatistics, collect
from ipvla.forgetting.probed import Reading
from tests.forgetting.probed_models import Categorical, Transformer, prompts

META = {"probe_sha256": "c0ffee", "commit": "ff57e1e"}


def modules(model: Transformer, number: int = 2) -> dict[str, nn.Module]:
    layer = model.layers[number]
    return {f"layers.{number}.{name}": getattr(layer, name) for name in ("qkv", "o_proj", "up_proj", "down_proj")}


def collected(**changes: Any) -> ModuleStatistics:
    model = Transformer()
    return collect(model, prompts(), modules(model), META, **changes)


def test_they_are_symmetric_positive_and_of_trace_equal_to_their_dimension() -> None:
    model = Transformer()
    for name, (a, g) in collected().modules.items():
        module = modules(model)[name]
        for moment, size in ((a, module.in_features), (g, module.out_features)):
            assert moment.shape == (size, size)
            assert moment.dtype == torch.float64
            assert torch.equal(moment, moment.T)
            assert moment.trace().item() == pytest.approx(size)
            assert torch.linalg.eigvalsh(moment)[0] > -1e-9


class Softmax(Categorical):
    """Logits W x of the last of two tokens; the first goes nowhere."""

    name, width = "softmax", 4

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 7, bias=False).requires_grad_(False)
        self.layers = [self.linear]

    def read(self, batch: Tensor) -> Reading:
        y = self.linear(batch)
        return Reading((y,), torch.ones(batch.shape[:2], dtype=torch.bool), y[:, -1])


def test_of_a_softmax_they_are_its_fisher_information_and_the_inputs_that_reach_it() -> None:
    model = Softmax()
    batches = [torch.randn(40, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    a, g = collect(model, batches, {"linear": model.linear}, META, labels=300).modules["linear"]
    x = torch.cat(batches)[:, -1].double()
    p = model.linear(x.float()).softmax(-1).double()
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(a, x.T @ x * 4 / x.square().sum())
    torch.testing.assert_close(g, fisher * 7 / fisher.trace(), rtol=0, atol=0.03)


def test_padding_leaves_them_alone() -> None:
    padded = prompts()[0].clone()
    padded[:, 3:5] = 0
    model = Transformer()
    with_padding = collect(model, [padded], modules(model), META).modules
    model.embedding.weight[0] = 100
    with_other_padding = collect(model, [padded], modules(model), META).modules
    for name, (a, g) in with_padding.items():
        torch.testing.assert_close(with_other_padding[name][0], a)
        torch.testing.assert_close(with_other_padding[name][1], g)


def test_the_seed_decides_the_labels() -> None:
    first, again, other = (collected(seed=seed).modules["layers.2.qkv"] for seed in (0, 0, 1))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(first[0], other[0])


def test_the_teacher_stays_as_it_was() -> None:
    model, (batch, *_) = Transformer(), prompts()
    before = model.read(batch).output
    collect(model, prompts(), modules(model), META)
    assert torch.equal(model.read(batch).output, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    statistics = collected()
    statistics.save(tmp_path)
    loaded = ModuleStatistics.load(
        tmp_path, {"backbone": "transformer", "width": 16, "probe_sha256": "c0ffee", "num_layers": 6}
    )
    assert list(loaded.modules) == list(statistics.modules)
    for name, pair in statistics.modules.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(pair, loaded.modules[name], strict=True))
    assert {**META, "labels": 1, "seed": 0}.items() <= loaded.meta.items()


def test_those_of_another_model_or_with_a_module_missing_are_refused(tmp_path: Path) -> None:
    collected().save(tmp_path)
    with pytest.raises(ArtifactError, match="width 16, this run has 32"):
        ModuleStatistics.load(tmp_path, {"backbone": "transformer", "width": 32})
    meta = json.loads((tmp_path / "module_statistics.json").read_text())
    (tmp_path / "module_statistics.json").write_text(json.dumps({**meta, "modules": ["head"]}))
    with pytest.raises(ArtifactError, match="head"):
        ModuleStatistics.load(tmp_path, {"backbone": "transformer", "width": 16})


def test_modules_that_cannot_have_statistics_are_refused() -> None:
    model = Transformer()
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        collect(model, prompts(), {"norm": model.layers[0].norm}, META)
    with pytest.raises(ValueError, match=r"elsewhere.*did not run"):
        collect(model, prompts(), {"elsewhere": nn.Linear(2, 2)}, META)
    model.head.weight.fill_(0)
    with pytest.raises(ValueError, match=r"moments of layers\.2\.qkv have trace 0"):
        collect(model, prompts(), modules(model), META)
