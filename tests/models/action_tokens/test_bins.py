"""Bins: OpenVLA's ids and values to the letter, and no action from an id that means none."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipvla.models.action_tokens import ActionTokenError, BinTokensConfig
from ipvla.models.action_tokens.protocol import vocabulary_ids

BINS = BinTokensConfig().build()
#: Ids that OpenVLA's own code generated, and the normalised values that it read from them.
PUBLISHED = {
    31939: -0.5254902, 31927: -0.4313725, 31866: 0.0470588, 31877: -0.0392157, 31768: 0.8156863, 31758: 0.8941176,
    31745: 0.9960784, 31744: 0.9960784, 31999: -0.9960784,
}  # fmt: skip


def test_ids_and_values_are_openvlas() -> None:
    tokens = vocabulary_ids(torch.tensor([list(PUBLISHED)]), 32064, 64)
    assert torch.equal(vocabulary_ids(tokens, 32064, 64)[0], torch.tensor(list(PUBLISHED)))
    actions = BINS.decode(tokens, 3, 3).flatten()
    np.testing.assert_allclose(actions, list(PUBLISHED.values()), atol=1e-6)


@given(st.lists(st.floats(-1.25, 1.25, width=32), min_size=6, max_size=6))
def test_a_round_trip_errs_by_half_a_bin_at_most(values: list[float]) -> None:
    chunk = torch.tensor(values).view(1, 2, 3)
    tokens = BINS.encode(chunk)
    edges = np.linspace(-1, 1, 256)
    ids = 32000 - np.digitize(np.clip(values, -1, 1), edges)
    assert vocabulary_ids(tokens, 32064, 64)[0].tolist() == ids.tolist()
    decoded = BINS.decode(tokens, 2, 3)
    centres = (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(decoded.flatten(), centres[np.clip(32000 - ids - 1, 0, 254)], atol=1e-6)
    assert (decoded - chunk.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("bad", [-1, 256, 40000])
def test_another_id_is_no_action(bad: int) -> None:
    with pytest.raises(ActionTokenError, match=rf"row 1 has token {bad}, and action tokens are 0\.\.255"):
        BINS.decode(torch.tensor([[0, 1], [bad, 3]]), 1, 2)


def test_another_number_of_tokens_is_no_chunk() -> None:
    with pytest.raises(ActionTokenError, match="5 tokens, and a chunk of 2 actions with 3 dimensions has 6"):
        BINS.decode(torch.zeros(1, 5, dtype=torch.long), 2, 3)
