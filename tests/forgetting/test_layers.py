"""Which layers share a subspace, and how their hidden states are reached from outside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ipvla.forgetting.probed import edit_output, edited, inputs, outputs, tapped
from ipvla.forgetting.subspaces import LayerGroup, layer_groups


def test_of_18_layers_the_last_four_in_pairs_each_represented_by_its_later_layer() -> None:
    assert layer_groups(18) == (LayerGroup("a", (14, 15), 15), LayerGroup("b", (16, 17), 17))


@given(half=st.integers(1, 20), before=st.integers(0, 60))
@settings(deadline=None)
def test_two_equal_groups_are_the_last_layers_in_order(half: int, before: int) -> None:
    first, second = layer_groups(before + 2 * half, 2 * half)
    assert first.layers + second.layers == tuple(range(before, before + 2 * half))
    assert len(first.layers) == len(second.layers) == half
    assert (first.representative, second.representative) == (first.layers[-1], second.layers[-1])


@pytest.mark.parametrize(
    ("num_layers", "last", "said"), [(18, 3, "even"), (18, 0, "even"), (3, 4, "only 3 layers")]
)
def test_what_cannot_be_halved_or_is_not_there_is_refused(num_layers: int, last: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layer_groups(num_layers, last)


class Tupled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, "cache"


def test_an_edit_reaches_a_tensor_or_a_tuples_first_element_while_it_lasts() -> None:
    plain, tupled, x = nn.Identity(), Tupled(), torch.zeros(2)
    with edited(plain, lambda h: h + 5), edited(tupled, lambda h: h * 3):
        assert plain(x).tolist() == [5, 5]
        assert tupled(x)[0].tolist() == [3, 3]
        assert tupled(x)[1] == "cache"
    assert plain(x).tolist() == [0, 0]
    assert tupled(x)[0].tolist() == [1, 1]


def test_an_edit_ends_with_an_error_too() -> None:
    layer = nn.Identity()
    with pytest.raises(RuntimeError), edited(layer, lambda h: h + 5):
        raise RuntimeError
    assert layer(torch.zeros(1)).item() == 0


def test_an_edit_by_handle_lasts_until_it_is_removed() -> None:
    layer, x = Tupled(), torch.zeros(2)
    handle = edit_output(layer, lambda h: h * 3)
    assert layer(x)[0].tolist() == [3, 3]
    handle.remove()
    assert layer(x)[0].tolist() == [1, 1]


def test_outputs_and_inputs_are_those_of_the_last_pass_in_the_block() -> None:
    layers = {"plain": nn.Linear(2, 2), "tupled": Tupled()}
    x = torch.ones(1, 2, requires_grad=True)
    with outputs(layers) as put_out, inputs(layers) as taken:
        for scale in (1, 2):
            plain = layers["plain"](scale * x)
            layers["tupled"](plain)
    layers["tupled"](x)
    assert torch.equal(put_out["plain"], plain)
    assert torch.equal(put_out["tupled"], plain + 1)
    assert put_out["plain"].requires_grad
    assert torch.equal(taken["plain"], 2 * x.detach())
    assert torch.equal(taken["tupled"], plain.detach())
    assert not taken["tupled"].requires_grad


def test_a_tap_is_the_outputs_gradient_under_frozen_weights_and_changes_nothing() -> None:
    first, second = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2).requires_grad_(False)
    x = torch.randn(5, 3)
    plain = second(first(x).tanh())
    with tapped({"first": first, "second": second}) as leaves:
        y = second(first(x).tanh())
    assert torch.equal(y, plain)
    y.square().sum().backward()
    torch.testing.assert_close(leaves["second"].grad, 2 * plain)
    torch.testing.assert_close(leaves["first"].grad, 2 * plain @ second.weight * (1 - first(x).tanh() ** 2))
