"""Heads: OpenVLA's bins to the letter, chunks that can be learned, masks that are honoured."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipvla.models.action_tokens.bins import action_bins, bin_centres
from ipvla.models.features import Features
from ipvla.models.heads import BinsConfig, HeadConfig, RegressionConfig

BATCH, CHUNK, ACTIONS = 16, 4, 3


class Sizes(NamedTuple):
    """What a head needs to know of a backbone."""

    width: int
    perception_size: int


def features(seed: int = 0) -> Features:
    random = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(BATCH, 8, generator=random),
        torch.randn(BATCH, 5, 6, generator=random),
        torch.randn(BATCH, 2, generator=random),
    )


@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=50))
def test_bins_are_numpys_digitize_and_decode_to_their_centre(values: list[float]) -> None:
    actions = torch.tensor(values)
    edges = np.linspace(-1, 1, 256)
    digitized = np.digitize(np.clip(values, -1, 1), edges)
    bins = action_bins(actions)
    assert (bins.numpy() == digitized - 1).all()
    centres = (edges[:-1] + edges[1:]) / 2
    assert np.allclose(bin_centres(bins).numpy(), centres[np.clip(digitized - 1, 0, 254)], atol=1e-6)
    assert (bin_centres(bins) - actions.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("config", [RegressionConfig(32), RegressionConfig(32, loss="l1"), BinsConfig(32)])
def test_a_head_learns_a_chunk_from_features(config: HeadConfig) -> None:
    torch.manual_seed(0)
    head = config.build(Sizes(8, 6), 2, CHUNK, ACTIONS)
    x = features()
    actions = torch.stack([x.cognition[:, 0], x.proprio[:, 1], x.perception[:, 2, 3]], -1).tanh()
    actions = actions[:, None].expand(-1, CHUNK, -1)
    weight = torch.ones_like(actions, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        head.loss(x, actions, weight).backward()
        optimizer.step()
    assert head.sample(x).shape == (BATCH, CHUNK, ACTIONS)
    assert (head.sample(x) - actions).abs().mean() < 0.06


@pytest.mark.parametrize("config", [RegressionConfig(16), BinsConfig(16)])
def test_what_the_mask_hides_has_no_influence(config: HeadConfig) -> None:
    torch.manual_seed(0)
    head = config.build(Sizes(8, 6), 2, CHUNK, ACTIONS)
    weight = torch.rand(BATCH, CHUNK, ACTIONS) < 0.5
    actions = torch.rand(BATCH, CHUNK, ACTIONS) * 2 - 1
    other = torch.where(weight, actions, torch.zeros_like(actions))
    assert head.loss(features(), actions, weight) == head.loss(features(), other, weight)
    nothing = head.loss(features(), actions, torch.zeros_like(weight))
    assert nothing == 0
    nothing.backward()
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_a_glimpse_can_return_a_place() -> None:
    """The query finds the marked cell and the head reads out its coordinates."""
    torch.manual_seed(0)
    head = RegressionConfig(64).build(Sizes(4, 3), 1, 1, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    line = torch.linspace(-1, 1, 8)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(1, 64, 2)
    for _ in range(500):
        cell = torch.randint(64, (64,))
        marked = torch.nn.functional.one_hot(cell, 64)[..., None].float()
        x = Features(torch.zeros(64, 4), torch.cat([marked, grid.expand(64, -1, -1)], -1), torch.zeros(64, 1))
        target = grid[0, cell][:, None]
        loss = head.loss(x, target, torch.ones_like(target, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.08


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r'"huber".*"l1" or "mse"|huber'):
        RegressionConfig(loss="huber")
    with pytest.raises(ValueError, match="at least 1"):
        BinsConfig(hidden=0)
