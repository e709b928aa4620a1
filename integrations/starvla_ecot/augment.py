"""OpenVLA's image augmentation on one frame: a random crop, then brightness, contrast, saturation and hue."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

#: OpenVLA's settings (openvla/prismatic/vla/datasets/datasets.py): share of the area that a crop keeps, then how
#: far brightness (of 1) and hue (of a turn) move, and between which factors contrast and saturation change.
CROP_AREA = 0.9
BRIGHTNESS, HUE = 0.2, 0.05
CONTRAST = SATURATION = (0.8, 1.2)


def augment(image: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A changed copy of uint8 [H, W, 3] RGB, same size; it depends on the generator's state alone."""
    place = rng.random(2)
    brightness, hue = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(-HUE, HUE)
    contrast, saturation = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    x = _crop(image, place).astype(np.float32) / 255 + np.float32(brightness)
    mean = x.mean((0, 1))  # of each channel alone, as TensorFlow's adjust_contrast
    x = ((x - mean) * np.float32(contrast) + mean).clip(0, 1)
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)  # hue in degrees, the others in [0, 1]
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * hue)) % 360
    hsv[..., 1] = (hsv[..., 1] * np.float32(saturation)).clip(0, 1)
    x = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return np.asarray((x * 255).round().clip(0, 255), np.uint8)


def _crop(image: npt.NDArray[np.uint8], place: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """`CROP_AREA` of the image from a place in [0, 1]^2 of those that fit, resized back."""
    height, width = image.shape[:2]
    kept = CROP_AREA**0.5
    top, left = place * (1 - kept) * (height, width)
    # one affine map does both: each target pixel's centre looks up its place in the crop
    matrix = np.array([[kept, 0, left + (kept - 1) / 2], [0, kept, top + (kept - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cropped = cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cropped, np.uint8)
