"""The exact diagonal of the Fisher information, one record at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.fisher import DiagonalFisher, FisherConfig
from tests.forgetting.probed_models import Transformer, prompts
from tests.forgetting.test_module_statistics import Softmax

META = {"probe_sha256": "c0ffee", "commit": "ff57e1e"}


def measured(model: Any, records: list[Tensor], weights: dict[str, nn.Parameter], **config: Any) -> DiagonalFisher:
    return DiagonalFisher.measure(model, records, weights, META, FisherConfig(**config))


def singly(batches: list[Tensor]) -> list[Tensor]:
    return [row[None] for batch in batches for row in batch]


def test_of_a_softmax_it_is_the_diagonal_of_the_known_matrix() -> None:
    model = Softmax()
    records = singly([torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(0))])
    found = measured(model, records, {"w": model.linear.weight}, labels=400).weights["w"]
    x = torch.cat(records)[:, -1]
    p = model.linear(x).softmax(-1)
    expected = torch.einsum("nk,ni->ki", p * (1 - p), x.square()) / len(x)  # E (1[y = k] - p_k)^2 = p_k (1 - p_k)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.01)


def test_tokens_of_a_record_are_summed_before_they_are_squared() -> None:
    """The same record read as one, by hand, with the labels that the seed draws."""
    model, record = Transformer(reads_all=True), prompts()[0][:1]
    weight = model.layers[2].o_proj.weight
    found = measured(model, [record], {"w": weight}, seed=3).weights["w"]
    weight.requires_grad_(True)
    loss = model.sampled_loss(model.read(record).output, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, torch.autograd.grad(loss, weight)[0].square())


def test_what_the_output_does_not_depend_on_gets_0_and_the_teacher_stays_as_it_was() -> None:
    model, idle = Transformer(), nn.Parameter(torch.ones(3))
    weights = {"idle": idle, "norm": model.layers[0].norm.weight}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measured(model, singly(prompts())[:4], weights).weights
    assert torch.equal(found["idle"], torch.zeros(3))
    assert found["norm"].min() > 0
    assert found["norm"].dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_what_was_saved_comes_back_and_nothing_else_does(tmp_path: Path) -> None:
    model = Transformer()
    fisher = measured(model, singly(prompts())[:3], {"head": model.head.weight})
    fisher.save(tmp_path)
    loaded = DiagonalFisher.load(tmp_path, {"backbone": "transformer", "width": 16, **META})
    assert torch.equal(loaded.weights["head"], fisher.weights["head"])
    assert {**META, "weights": "adapters", "labels": 1, "seed": 0}.items() <= loaded.meta.items()
    with pytest.raises(ArtifactError, match="width 16, this run has 32"):
        DiagonalFisher.load(tmp_path, {"width": 32})
    with pytest.raises(ArtifactError, match="cannot be read"):
        DiagonalFisher.load(tmp_path / "nothing", {})


def test_what_cannot_be_measured_is_refused() -> None:
    model = Transformer()
    weights = {"head": model.head.weight}
    with pytest.raises(ValueError, match="a batch has 16 records"):
        measured(model, prompts(), weights)
    with pytest.raises(ValueError, match="no record"):
        measured(model, [], weights)
    with pytest.raises(ValueError, match=r"meta lacks \['commit'\]"):
        DiagonalFisher.measure(model, [], weights, {"probe_sha256": "c0ffee"}, FisherConfig())
    with pytest.raises(ValueError, match=r"fisher\.weights is 'some'"):
        FisherConfig(weights="some")
    with pytest.raises(ValueError, match=r"fisher\.labels is 0"):
        FisherConfig(labels=0)
    model.head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="output is not finite"):
        measured(model, singly(prompts()), weights)
