"""One successful episode of an expert, and its file."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ipvla.files import replacing


@dataclass(frozen=True)
class Demonstration:
    """An episode with one record per control step (20 Hz): what was seen, and what the expert would do then.

    Attributes:
        task, family, instruction: in words.
        seed: of the episode.
        images: camera name -> uint8 [T, H, W, 3], upright RGB.
        state: float32 [T, 8], LIBERO's proprioception.
        action: float32 [T, 7] in [-1, 1]; the expert's label, without the noise that was played.
        reasoning: T strings: the plan as it should read once the step's observation has been seen, see
            `ipvla.sim.recall.plan`. Empty: none was recorded.
        questions, answers: T strings each: a question that the step's picture decides, and its answer, see
            `ipvla.sim.recall.questions`; "" where there is none. Empty: none was recorded.
    """

    task: str
    family: str
    instruction: str
    seed: int
    images: dict[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    reasoning: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        steps = {len(self.state), len(self.action), *map(len, self.images.values())}
        if len(steps) != 1 or steps == {0}:
            raise ValueError(
                f"a demonstration's records have lengths {sorted(steps)}; they must be equal and not 0"
            )
        for name in ("reasoning", "questions", "answers"):
            texts = getattr(self, name)
            if texts and len(texts) != len(self):
                raise ValueError(
                    f"{name} has {len(texts)} strings for {len(self)} control steps; "
                    "give one per step, or () for none"
                )
        if len(self.questions) != len(self.answers):
            raise ValueError(
                f"there are {len(self.questions)} questions and {len(self.answers)} answers; give both or neither"
            )

    def __len__(self) -> int:
        """Control steps."""
        return len(self.action)

    def save(self, path: Path) -> None:
        """Writes one compressed npz; it appears complete or not at all."""
        arrays = {f"images/{camera}": pictures for camera, pictures in self.images.items()}
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file,
                task=np.array(self.task),
                family=np.array(self.family),
                instruction=np.array(self.instruction),
                seed=np.array(self.seed, dtype=np.int64),
                state=self.state,
                action=self.action,
                reasoning=np.array(self.reasoning, dtype=np.str_),
                questions=np.array(self.questions, dtype=np.str_),
                answers=np.array(self.answers, dtype=np.str_),
                **arrays,  # type: ignore[arg-type]
            )

    @classmethod
    def load(cls, path: Path) -> Demonstration:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, corrupt, or no demonstration.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(
                    task=str(file["task"]),
                    family=str(file["family"]),
                    instruction=str(file["instruction"]),
                    seed=int(file["seed"]),
                    images={name[7:]: file[name] for name in file.files if name.startswith("images/")},
                    state=file["state"],
                    action=file["action"],
                    # Files from before plans and questions were recorded have no such arrays.
                    **{
                        name: tuple(map(str, file[name]))
                        for name in ("reasoning", "questions", "answers")
                        if name in file.files
                    },
                )
        except (FileNotFoundError, PermissionError):
            raise
        except (
            zipfile.BadZipFile,
            zlib.error,
            LookupError,
            ValueError,
            EOFError,
            OSError,
            RuntimeError,
            SyntaxError,
        ) as error:
            raise ValueError(
                f"{path} is not a complete demonstration ({error}); delete it and collect it again"
            ) from error
