"""One vector per record: the mean over the instruction's own tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.forgetting.probed import instruction_mean

masks = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(masks, st.integers(0, 99))
@settings(deadline=None)
def test_it_is_the_mean_over_the_mask_and_zero_where_that_is_empty(rows: list[list[bool]], seed: int) -> None:
    mask = torch.tensor(rows)
    hidden = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(seed))
    pooled = instruction_mean(hidden, mask)
    assert pooled.dtype == torch.float64
    for vector, states, row in zip(pooled, hidden, mask, strict=True):
        expected = states[row].double().mean(0) if row.any() else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(vector, expected)


@pytest.mark.parametrize("unread", [torch.nan, torch.inf, 1e30])
def test_what_lies_outside_the_mask_is_never_read(unread: float) -> None:
    hidden, mask = torch.ones(1, 3, 2), torch.tensor([[True, False, True]])
    hidden[0, 1] = unread
    assert instruction_mean(hidden, mask).tolist() == [[1, 1]]


def test_many_half_precision_tokens_do_not_round_away() -> None:
    hidden = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    hidden[0, 0] = 256
    assert instruction_mean(hidden, torch.ones(1, 4096, dtype=torch.bool)).item() == (4095 + 256) / 4096


@pytest.mark.parametrize("mask", [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)], ids=["shape", "dtype"])
def test_a_mask_that_does_not_fit_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        instruction_mean(torch.zeros(2, 3, 5), mask)
