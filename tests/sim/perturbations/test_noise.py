"""A bad sensor: pictures stay pictures, what is seen gets worse with severity, and every step has its own draw."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from ipvla.sim.perturbations.noise import CORRUPTIONS, NoiseConfig, Sensor, motion_blur

corruptions = pytest.mark.parametrize("corruption", CORRUPTIONS)


def scene(size: int = 128) -> npt.NDArray[np.uint8]:
    """A checkerboard on a gradient, with a red disc."""
    rows, columns = np.indices((size, size))
    checks = ((rows // (size // 8) + columns // (size // 8)) % 2) * 90
    picture = np.stack([checks + 40, checks + 60 + 60 * rows // size, checks + 80], -1).astype(np.uint8)
    return np.asarray(cv2.circle(picture, (size // 2, size // 2), size // 6, (220, 30, 30), -1))


def contrast(picture: npt.NDArray[Any]) -> float:
    """Of red, between the disc and what is around it."""
    size = len(picture)
    distance = np.hypot(*(np.indices((size, size)) - size / 2))
    inside, around = distance < size / 7, (distance > size / 5) & (distance < size / 3)
    return float(picture[inside, 0].mean() - picture[around, 0].mean())


def detail(picture: npt.NDArray[np.uint8]) -> float:
    """Mean difference of neighbouring pixels."""
    return float(np.abs(np.diff(picture.astype(float), axis=1)).mean())


@corruptions
def test_a_step_has_its_own_random_numbers_and_the_same_ones_again(corruption: str) -> None:
    sensor, picture = Sensor(corruption, 6, (1, 2)), scene()
    first = sensor.picture(picture, "agentview", 3)
    assert first.dtype == np.uint8
    assert first.shape == picture.shape
    later = sensor.picture(picture, "agentview", 4)
    np.testing.assert_array_equal(sensor.picture(picture, "agentview", 3), first)
    random = corruption in ("motion_blur", "fog", "glass_blur")
    assert np.array_equal(first, later) != random
    assert np.array_equal(Sensor(corruption, 6, (1, 3)).picture(picture, "agentview", 3), first) != random
    np.testing.assert_array_equal(scene(), picture, "what was rendered stays as it is")
    np.testing.assert_array_equal(sensor.picture(picture, "robot0_eye_in_hand", 3), picture)


@corruptions
def test_the_more_severe_the_less_is_seen(corruption: str) -> None:
    picture = scene()
    seen = [Sensor(corruption, severity, (5, 6)).picture(picture, "agentview", 0) for severity in (1, 4, 7, 10)]
    changed = [np.abs(one.astype(float) - picture).mean() for one in seen]
    assert changed[0] > 0.5
    if corruption == "fog":  # its own structure differs from draw to draw
        steps = range(20)
        hazy = [[Sensor("fog", k, (5, 6)).picture(picture, "agentview", t) for t in steps] for k in (1, 4, 7, 10)]
        contrasts = [contrast(np.mean(one, axis=0)) for one in hazy]
        assert contrasts == sorted(contrasts, reverse=True)
        assert contrasts[0] < 0.8 * contrast(picture)
        assert contrasts[-1] < 0.3 * contrast(picture)
    else:
        assert changed == sorted(changed)
        if corruption != "glass_blur":  # its grain is detail
            assert detail(seen[-1]) < detail(seen[0]) < detail(picture)
        means = [one.mean() for one in seen]
        assert np.ptp(means) < 12, "blurred, not darkened"


@corruptions
def test_small_pictures_are_as_bad_as_large_ones(corruption: str) -> None:
    """What a large one loses and a small one loses, seen at the same size."""
    large, small = scene(256), cv2.resize(scene(256), (64, 64), interpolation=cv2.INTER_AREA)
    severe = Sensor(corruption, 8, (1, 1))
    of_large = cv2.resize(severe.picture(large, "agentview", 0), (64, 64), interpolation=cv2.INTER_AREA)
    of_small = severe.picture(small, "agentview", 0)
    lost = [np.abs(one.astype(float) - small).mean() for one in (of_large, of_small)]
    assert lost[1] == pytest.approx(lost[0], rel=0.35)


def test_a_point_is_smeared_along_one_line_and_keeps_its_brightness() -> None:
    point = np.zeros((129, 129, 3), np.float32)
    point[64, 64] = 1
    smeared = motion_blur(point, 8, np.random.default_rng(0))[..., 0]
    assert smeared.sum() == pytest.approx(1, abs=1e-3)
    rows, columns = np.nonzero(smeared > 1e-6)
    variances = np.linalg.eigvalsh(np.cov(rows, columns))
    assert variances[1] > 20 * variances[0]


def test_all_five_are_drawn_and_named_by_number() -> None:
    drawn = [NoiseConfig(level=3).change("task", seed) for seed in range(100)]
    assert {sensor.corruption for sensor in drawn} == set(CORRUPTIONS)
    numbers = {sensor.drawn["noise"] for sensor in drawn}
    assert numbers == {10 * kind + severity for kind in range(5) for severity in (5, 6)}
