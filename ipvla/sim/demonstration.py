"""One successful episode of an expert, and its file."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipvla.files import replacing
from ipvla.types import Episode


@dataclass(frozen=True)
class Demonstration(Episode):
    """An episode at 20 Hz: what was seen, and what the expert would do then, without the noise that was played.

    State is LIBERO's proprioception, float32 [T, 8], actions are float32 [T, 7] in [-1, 1]. Texts are as in
    `ipvla.sim.recall.labels`.

    Raises:
        ValueError: records or texts are of different lengths, or there are none.
    """

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
