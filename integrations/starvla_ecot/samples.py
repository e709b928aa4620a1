"""From a frame to the sample that a model's `forward` takes: pictures, words, a chunk of actions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from integrations.starvla_ecot.config import EcotConfig
from ipvla.data.conventions import past_the_end
from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.data.reasoning.steps import Parts, ReasoningFilter, render

logger = logging.getLogger(__name__)

FloatArray: TypeAlias = npt.NDArray[np.float32]
#: `image`, `lang`, `action`, `reasoning` and perhaps `state`: `SampleMaker` documents them.
Sample: TypeAlias = dict[str, Any]

#: What a draw is for: one more number of its key, so that dropout and augmentation do not share their luck.
_DROPOUT, _AUGMENTATION = 1, 2


@dataclass(frozen=True)
class EpisodeNumbers:
    """What all frames of an episode share.

    Attributes:
        instruction: the task in words.
        action: float32 [T, A], normalised.
        state: float32 [T, P], normalised; None where the dataset has no proprioception.
        absolute: which of the A dimensions repeat past the episode's end; the others become 0 there.
    """

    instruction: str
    action: FloatArray
    state: FloatArray | None
    absolute: tuple[bool, ...]


@dataclass(frozen=True)
class Frame:
    """One control step with its pictures still encoded, and with nothing of the episode's other pictures.

    Attributes:
        numbers: of its episode.
        t: the step among the kept ones.
        pictures: (one camera's pictures, index in them) per view.
        parts: of its reasoning, all that are known.
        key: whole numbers that name the frame and its turn.
    """

    numbers: EpisodeNumbers
    t: int
    pictures: tuple[tuple[Pictures, int], ...]
    parts: Parts
    key: tuple[int, ...]


class SampleMaker:
    """Frames to samples, each a pure function of frame, epoch and configuration.

    A sample has
        image: one PIL image (RGB, `image_size`) per view;
        lang: the instruction;
        action: float32 [past + 1 + future, A], normalised to about [-1, 1] (OpenVLA's BOUNDS_Q99), the gripper
            as the dataset's standard has it; the frame's own action at index `past`;
        reasoning: its text after stage and dropout, "" where there is none;
        state: float32 [1, P], normalised, if the dataset has proprioception.
    """

    def __init__(self, config: EcotConfig) -> None:
        self._config = config
        train = config.ecot.train
        self._augments = config.ecot.image_aug and train
        self._filter = ReasoningFilter(
            config.ecot.scheduled_stage, config.ecot.reasoning_dropout_prob if train else 0.0
        )
        self.length = config.action_horizon or config.chunk
        if self.length != config.chunk:
            logger.warning(
                "framework.action_model: the windows %d + 1 + %d give chunks of %d actions, action_horizon takes "
                "%d: chunks are %s. Set future_action_window_size to %d to read them so from the data",
                config.past_action_window_size,
                config.future_action_window_size,
                config.chunk,
                self.length,
                self.alignment,
                self.length - 1 - config.past_action_window_size,
            )

    @property
    def alignment(self) -> str:
        """How chunks meet the model's length: "equal", "cut" or "padded"."""
        if self.length == self._config.chunk:
            return "equal"
        return "cut" if self.length < self._config.chunk else "padded"

    def __call__(self, frame: Frame, epoch: int) -> Sample:
        """ValueError if a picture cannot be decoded."""
        key = (self._config.seed, epoch, *frame.key)
        sample: Sample = {
            "image": [self._image(*picture, (*key, _AUGMENTATION)) for picture in frame.pictures],
            "lang": frame.numbers.instruction,
            "action": self._chunk(frame.numbers, frame.t),
            "reasoning": render(self._filter(frame.parts, (*key, _DROPOUT))),
        }
        if frame.numbers.state is not None:
            sample["state"] = frame.numbers.state[frame.t : frame.t + 1].copy()
        return sample

    def _image(self, pictures: Pictures, index: int, key: tuple[int, ...]) -> Image.Image:
        height, width = self._config.image_size
        image = Image.fromarray(pictures.decode(index))
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if self._augments:  # the same key for every view: all of a frame's views change alike
            image = Image.fromarray(augment(np.asarray(image), np.random.default_rng(key)))
        return image

    def _chunk(self, numbers: EpisodeNumbers, t: int) -> FloatArray:
        past = self._config.past_action_window_size
        window = chunk(numbers, t, past, min(self._config.chunk, self.length))
        if len(window) == self.length:
            return window
        rest = np.where(numbers.absolute, window[-1], np.float32(0))
        return np.concatenate([window, np.repeat(rest[None], self.length - len(window), 0)])


def chunk(numbers: EpisodeNumbers, t: int, past: int, length: int) -> FloatArray:
    """Actions from `past` steps before `t` on, float32 [length, A], as OpenVLA cuts them.

    Before the episode's start its first action repeats. Past its end absolute dimensions repeat the last action
    and the others are 0, which in normalised units is the middle of what the dataset does.
    """
    steps = t - past + np.arange(length)
    end = len(numbers.action)
    target = numbers.action[np.clip(steps, 0, end - 1)]
    return past_the_end(target, steps < end, "openvla", numbers.absolute)[0]


def views(pictures: Mapping[str, Pictures], raw_step: int) -> tuple[tuple[Pictures, int], ...]:
    """One picture per camera, in the standard's order; it keeps no other one in memory where it can be apart."""
    return tuple(
        (EncodedPictures((each.encoded[raw_step],)), 0) if isinstance(each, EncodedPictures) else (each, raw_step)
        for each in pictures.values()
    )


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
