"""What L2-SP and EWC add to the loss is quadratic in what training added to the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ipvla.forgetting.weight_penalty import EWCConfig, FullChange, L2SPConfig, LowRankChange, WeightChange

OUT, RANK, IN, SCALE = 5, 2, 7, 1.5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(*kernel: int) -> tuple[nn.Parameter, nn.Parameter, WeightChange]:
    """A and B after training, and the change as it was set up before."""
    a = nn.Parameter(random(RANK, IN, *kernel, seed=0))
    b = nn.Parameter(torch.zeros(OUT, RANK, *[1] * len(kernel), dtype=torch.float64))
    change = LowRankChange(a, b, SCALE)
    with torch.no_grad():
        b.copy_(random(*b.shape, seed=1))
    return a, b, change


FISHER = random(OUT, IN, seed=2).square()


@pytest.mark.parametrize("importance", [None, FISHER], ids=["l2_sp", "ewc"])
def test_of_an_adapter_it_is_that_of_the_product_that_is_never_formed(importance: Tensor | None) -> None:
    a, b, change = adapter()
    if importance is None:
        ours, flat = (
            L2SPConfig(strength=3).build({"w": change}).penalty(0),
            torch.ones(OUT, IN, dtype=torch.float64),
        )
    else:
        ours = EWCConfig(strength=3).build({"w": change}, {"w": importance}).penalty(0)
        flat = importance / importance.mean()
    delta = (SCALE * b @ a).detach().requires_grad_()
    theirs = 3 / 2 * (flat * delta.square()).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (of_delta,) = torch.autograd.grad(theirs, delta)
    for found, expected in zip(
        torch.autograd.grad(ours, (a, b)), (SCALE * b.T @ of_delta, SCALE * of_delta @ a.T), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # F is kept in float32


def test_of_a_convolution_it_is_that_of_the_flattened_kernel() -> None:
    a, b, change = adapter(3, 3)
    delta = SCALE * torch.einsum("orij,rckl->ockl", b, a)
    torch.testing.assert_close(L2SPConfig(strength=2).build({"w": change}).penalty(0), delta.square().sum())
    fisher = random(OUT, IN, 3, 3, seed=3).square()
    expected = (fisher / fisher.mean() * delta.square()).sum()
    ewc = EWCConfig(strength=2).build({"w": change}, {"w": fisher}).penalty(0)
    torch.testing.assert_close(ewc, expected, rtol=1e-6, atol=0)


def test_of_a_weight_that_is_trained_itself_it_is_the_distance_from_the_start() -> None:
    weight = nn.Parameter(random(3, 4, seed=0))
    start, fisher = weight.detach().clone(), random(3, 4, seed=1).square()
    l2 = L2SPConfig(strength=1).build({"w": FullChange(weight)})
    ewc = EWCConfig(strength=1).build({"w": FullChange(weight)}, {"w": fisher})
    assert l2.penalty(0) == ewc.penalty(0) == 0
    with torch.no_grad():
        weight.add_(random(3, 4, seed=2))
    torch.testing.assert_close(l2.penalty(0), (weight - start).square().sum() / 2)
    expected = (fisher / fisher.mean() * (weight - start).square()).sum() / 2
    torch.testing.assert_close(ewc.penalty(0), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(l2.penalty(0), weight)[0], weight.detach() - start)


def test_fisher_information_is_normalised_over_all_weights_together() -> None:
    """Which weight matters more than another survives, how large the numbers are does not."""
    changes = {name: FullChange(nn.Parameter(torch.zeros(2, 2))) for name in "ab"}
    fisher = {"a": torch.full((2, 2), 30.0), "b": torch.full((2, 2), 10.0), "not held": torch.full((9, 9), 1e9)}
    penalty = EWCConfig(strength=2).build(changes, fisher)
    for change in changes.values():
        change._weight.data.fill_(1.0)
    assert penalty.penalty(0).item() == pytest.approx(4 * 1.5 + 4 * 0.5)
    flat = EWCConfig(strength=2).build(changes, {name: torch.full((2, 2), 7.0) for name in "ab"})
    assert flat.penalty(0).item() == pytest.approx(L2SPConfig(strength=2).build(changes).penalty(0).item())


def test_low_precision_weights_are_compared_in_float32() -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    penalty = L2SPConfig(strength=2).build({"w": FullChange(weight)})
    weight.data.add_(0.0078125)
    assert penalty.penalty(0).dtype == torch.float32
    assert penalty.penalty(0).item() == pytest.approx(16 * 0.0078125**2)


def test_what_cannot_be_held_is_refused() -> None:
    for config in (L2SPConfig, EWCConfig):
        for strength in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="must be finite and at least 0"):
                config(strength=strength)
    with pytest.raises(ValueError, match="no weight to hold"):
        L2SPConfig(strength=1).build({})
    with pytest.raises(ValueError, match="B of an adapter is not 0 before training"):
        LowRankChange(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    change = {"w": FullChange(nn.Parameter(torch.ones(2, 3)))}
    for fisher, told in (
        ({}, r"no Fisher information of w \(1 weights lack it\)"),
        ({"w": torch.ones(3, 2)}, r"of w is \[3, 2\], the weight is \[2, 3\]"),
        ({"w": torch.zeros(2, 3)}, r"sums to 0\.0"),
        ({"w": torch.full((2, 3), torch.nan)}, "sums to nan"),
    ):
        with pytest.raises(ValueError, match=told):
            EWCConfig(strength=1).build(change, fisher)
