"""From a frame to the sample that a model's `forward` takes: pictures, words, a chunk of actions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from integrations.starvla_ecot.augment import augment
from integrations.starvla_ecot.config import EcotConfig
from ipvla.data.chunks import past_the_end
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


def one_picture(pictures: Pictures, index: int) -> tuple[Pictures, int]:
    """A picture that keeps no other one in memory, where pictures are encoded one by one."""
    if isinstance(pictures, EncodedPictures):
        return EncodedPictures((pictures.encoded[index],)), 0
    return pictures, index


def views(pictures: Mapping[str, Pictures], raw_step: int) -> tuple[tuple[Pictures, int], ...]:
    """One picture per camera, in the standard's order."""
    return tuple(one_picture(each, raw_step) for each in pictures.values())
