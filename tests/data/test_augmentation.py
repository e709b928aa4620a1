"""Training pictures vary by episode and epoch alone; rollouts and targets do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipvla.data.augmentation import AugmentationConfig
from ipvla.data.dataset import EpisodeDataset
from ipvla.data.lanes import LaneConfig
from ipvla.data.plan import PlanPosition

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 2, 12, 10, 3), dtype=np.uint8)


@given(st.integers(0, 5), st.integers(0, 9))
def test_a_shift_moves_every_picture_of_an_episode_alike_and_repeats_the_edge(shift: int, key: int) -> None:
    varied = AugmentationConfig(shift_px=shift).apply(PICTURES, (0, 1, key))
    for view in range(2):
        moves = [
            (dy, dx)
            for dy in range(-shift, shift + 1)
            for dx in range(-shift, shift + 1)
            if np.array_equal(
                varied[:, view],
                PICTURES[:, view][:, np.clip(np.arange(12) + dy, 0, 11)][:, :, np.clip(np.arange(10) + dx, 0, 9)],
            )
        ]
        assert len(moves) == 1


def test_brightness_scales_within_its_bounds_and_nothing_is_changed_in_place() -> None:
    before = PICTURES.copy()
    grey = np.full_like(PICTURES, 100)
    varied = AugmentationConfig(brightness=0.2).apply(grey, (0, 0, 7))
    assert 80 <= varied.min() <= varied.max() <= 120
    assert len(np.unique(varied[:, 0])) == len(np.unique(varied[:, 1])) == 1
    AugmentationConfig(shift_px=2, brightness=0.5).apply(PICTURES, (0, 0, 7))
    np.testing.assert_array_equal(PICTURES, before)


@pytest.mark.parametrize("wrong", [{"shift_px": -1}, {"brightness": 1.0}, {"brightness": -0.1}])
def test_what_cannot_be_varied_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"data.augmentation.{next(iter(wrong))}"):
        AugmentationConfig(**wrong)  # type: ignore[arg-type]


def test_batches_differ_in_pictures_alone_and_are_the_same_again(dataset: EpisodeDataset, make_transforms) -> None:
    config, transforms = LaneConfig(lanes=3, window=4, stride=3, seed=11), make_transforms()
    plain = config.build(dataset, transforms)
    varied = config.build(dataset, transforms, augmentation=AugmentationConfig(shift_px=3, brightness=0.1))
    first, second = PlanPosition(0, 0), PlanPosition(1, 0)
    a, b, again = plain.batch(first), varied.batch(first), varied.batch(first)
    assert not torch.equal(a.inputs.images, b.inputs.images)
    assert torch.equal(b.inputs.images, again.inputs.images)
    assert torch.equal(a.actions, b.actions)
    assert torch.equal(a.inputs.proprio, b.inputs.proprio)
    assert not torch.equal(varied.batch(second).inputs.images, plain.batch(second).inputs.images)
