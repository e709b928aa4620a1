"""One episode: raw as a simulator records it, and standardised with its pictures still encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures, Pictures


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
    """An episode as a standard gives it: fields as in `Episode`, pictures still encoded.

    Attributes:
        pictures: camera name -> T pictures.
        wordings: texts other than `instruction` that steps carry as their task.
        raw_step: int64 [T], the step in the dataset's own episode that each is: standards may leave steps out.
    """

    task: str
    family: str
    instruction: str
    seed: int
    pictures: Mapping[str, Pictures]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    raw_step: npt.NDArray[np.int64]
    reasoning: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    wordings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.action)

    @property
    def nbytes(self) -> int:
        pictures = sum(pictures.nbytes for pictures in self.pictures.values())
        recorded = (self.reasoning, self.questions, self.answers)
        texts = sum(8 * len(each) + sum(len(text) for text in set(each)) for each in recorded)
        return pictures + self.state.nbytes + self.action.nbytes + self.raw_step.nbytes + texts

    def image(self, t: int, camera: str) -> npt.NDArray[np.uint8]:
        """Decodes one frame to uint8 [H, W, 3] RGB; an unknown camera or a broken image is a ValueError."""
        if camera not in self.pictures:
            raise ValueError(f"no camera {camera!r} in the dataset; it has {sorted(self.pictures)}")
        pictures, step = self.pictures[camera], int(self.raw_step[t])
        try:
            if isinstance(pictures, EncodedPictures) and pictures.bits(step) > 8:
                raise ValueError("it has 16 bits per channel: depth, which is no camera's picture; leave it out")
            return pictures.decode(step)
        except ValueError as error:
            raise ValueError(
                f"the {camera!r} image at step {self.raw_step[t]} of a {self.task!r} episode cannot be decoded: "
                f"{error}"
            ) from None
