"""One episode, standardised with its pictures still encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures, Pictures


@dataclass(frozen=True)
class EncodedEpisode:
    """An episode as a standard gives it: fields as in `ipvla.types.Episode`, pictures still encoded.

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
