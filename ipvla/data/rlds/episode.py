"""One episode: raw as a simulator records it, and encoded as it lies on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt


class EpisodeRecord(Protocol):
    """What the writer needs of a demonstration; `Episode` documents the fields."""

    @property
    def task(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def instruction(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def images(self) -> Mapping[str, npt.NDArray[np.uint8]]: ...
    @property
    def state(self) -> npt.NDArray[np.float32]: ...
    @property
    def action(self) -> npt.NDArray[np.float32]: ...
    @property
    def reasoning(self) -> tuple[str, ...]: ...
    @property
    def questions(self) -> tuple[str, ...]: ...
    @property
    def answers(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Episode:
    """A whole recorded episode of T control steps.

    Attributes:
        task, family, instruction: names and the task in words.
        seed: of the layout, non-negative.
        images: camera name -> uint8 [T, H, W, 3], upright RGB, seen before the action of the same row.
        state: float32 [T, P], unnormalised proprioception.
        action: float32 [T, A], environment units.
        reasoning: T texts, the demonstrator's plan as it reads once the row's images are seen; () if not recorded.
        questions, answers: T texts each, a question about the row's images and its answer, "" for none; () if not
            recorded.
    """

    task: str
    family: str
    instruction: str
    seed: int
    images: Mapping[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    reasoning: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedEpisode:
    """An episode as read from disk: fields as in `Episode`, images still PNG or JPEG bytes per step."""

    task: str
    family: str
    instruction: str
    seed: int
    encoded_images: Mapping[str, Sequence[bytes]]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    reasoning: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.action)

    @property
    def nbytes(self) -> int:
        encoded = sum(len(image) for images in self.encoded_images.values() for image in images)
        recorded = (self.reasoning, self.questions, self.answers)
        texts = sum(8 * len(each) + sum(len(text) for text in set(each)) for each in recorded)
        return encoded + self.state.nbytes + self.action.nbytes + texts

    def image(self, t: int, camera: str) -> npt.NDArray[np.uint8]:
        """Decodes one frame to uint8 [H, W, 3] RGB; an unknown camera or a broken image is a ValueError."""
        if camera not in self.encoded_images:
            raise ValueError(f"no camera {camera!r} in the dataset; it has {sorted(self.encoded_images)}")
        pixels = cv2.imdecode(np.frombuffer(self.encoded_images[camera][t], np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None:
            raise ValueError(f"the {camera!r} image at step {t} of a {self.task!r} episode cannot be decoded")
        return np.asarray(pixels, np.uint8)
