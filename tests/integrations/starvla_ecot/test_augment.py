"""Augmentation: OpenVLA's ranges, one draw per frame, nothing outside uint8."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from integrations.starvla_ecot import samples as module
from integrations.starvla_ecot.samples import augment


def _off(monkeypatch: pytest.MonkeyPatch, *but: str) -> None:
    """Everything but these switched off."""
    for name, neutral in {"BRIGHTNESS": 0.0, "HUE": 0.0, "CONTRAST": (1, 1), "SATURATION": (1, 1)}.items():
        if name not in but:
            monkeypatch.setattr(module, name, neutral)
    if "CROP_AREA" not in but:
        monkeypatch.setattr(module, "CROP_AREA", 1.0)


def _image(seed: int = 0, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_the_same_draw_gives_the_same_picture_and_another_one_another() -> None:
    pictures = [augment(_image(), np.random.default_rng(key)) for key in (1, 1, 2)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_size_and_type_stay_and_the_picture_given_is_untouched() -> None:
    image, before = _image(), _image()
    changed = augment(image, np.random.default_rng(0))
    assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, before)


def test_with_all_off_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    _off(monkeypatch)
    difference = augment(_image(), np.random.default_rng(0)).astype(int) - _image()
    assert np.abs(difference).max() <= 1


def test_a_crop_shows_nine_tenths_of_the_area_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _off(monkeypatch, "CROP_AREA")
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(100)[:, None]
    corners = []
    for key in range(200):
        cropped = augment(ramp, np.random.default_rng(key)).astype(int)
        for axis, channel in ((1, 0), (0, 1)):
            span = np.ptp(cropped[..., channel].mean(1 - axis))
            assert abs(span - 99 * 0.9**0.5) < 1.5
        corners.append(cropped[0, 0, :2])
    low, high = np.min(corners, 0), np.max(corners, 0)
    assert (low <= 1).all()
    assert (high >= 4).all()
    assert (high <= 6).all()


def test_brightness_moves_by_a_fifth_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    _off(monkeypatch, "BRIGHTNESS")
    grey = np.full((8, 8, 3), 128, np.uint8)
    moved = [int(augment(grey, np.random.default_rng(key))[0, 0, 0]) - 128 for key in range(300)]
    assert -52 <= min(moved) < -45
    assert 45 < max(moved) <= 52


def test_contrast_is_about_each_channels_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    _off(monkeypatch, "CONTRAST")
    image = np.random.default_rng(0).integers(100, 150, (30, 30, 3), dtype=np.uint8)
    for key in range(20):
        changed = augment(image, np.random.default_rng(key)).astype(float)
        np.testing.assert_allclose(changed.mean((0, 1)), image.mean((0, 1)), atol=0.6)
        factor = changed.std((0, 1)) / image.std((0, 1))
        assert ((factor > 0.78) & (factor < 1.22)).all()
        assert np.ptp(factor) < 0.02


def test_hue_and_saturation_move_within_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    _off(monkeypatch, "HUE", "SATURATION")
    colour = (200, 120, 60)
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    turns, factors = [], []
    for key in range(300):
        seen = augment(np.full((4, 4, 3), colour, np.uint8), np.random.default_rng(key))[0, 0] / 255
        h, s, v = colorsys.rgb_to_hsv(*seen.tolist())
        turns.append((h - hue + 0.5) % 1 - 0.5)
        factors.append(s / saturation)
        assert abs(v - value) < 0.01
    assert 0.045 < max(turns) < 0.055
    assert -0.055 < min(turns) < -0.045
    assert 0.79 < min(factors) < 0.83
    assert 1.17 < max(factors) < 1.21
