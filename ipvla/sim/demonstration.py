"""Scripted experts, and the episodes that they demonstrate."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from ipvla.files import foreign_file, one_line, replacing
from ipvla.geometry import RecordedGeometry
from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import Episode, Observation

Vector = npt.NDArray[np.float64]

#: Noise levels of demonstrations; an episode draws one.
NOISE_LEVELS: Final = (0.0, 0.3, 0.6)
_NOISE_DECAY: Final = 0.7
#: The arrays of `RecordedGeometry`, in its order.
_GEOMETRY: Final = ("depth", "intrinsics", "pose")


class Expert(Protocol):
    """Solves one episode, which it sees as it truly is."""

    def act(self) -> Vector:
        """float64 [A] (LIBERO's hand: [7] in [-1, 1]), the action for the state that the world is in now."""


class DartNoise:
    """Smooth noise on the motion that is played, never on the actions that are recorded.

    Demonstrations then show how to come back from where a learner will stray (DART, Laskey et al. 2017,
    arXiv:1703.09327).

    Args:
        rng: of the episode.
        share: scales the level that the episode draws from `NOISE_LEVELS`.
    """

    def __init__(self, rng: np.random.Generator, share: float) -> None:
        self._rng, self._level, self._now = rng, float(rng.choice(NOISE_LEVELS)) * share, np.zeros(3)

    def disturb(self, action: Vector) -> Vector:
        """What is played instead of the next action, [7]."""
        self._now = _NOISE_DECAY * self._now + self._rng.normal(0.0, 0.7 * self._level, size=3)
        played = action.copy()
        played[:3] = np.clip(played[:3] + self._now, -1.0, 1.0)
        return played


#: Plays the first steps of an episode, as many as it draws, in the expert's place.
Lead = Callable[[Simulator, np.random.Generator], None]


class Watched(Protocol):
    """A simulator whose state can be read without drawing."""

    @property
    def t(self) -> int: ...
    def observe(self, geometry: bool = False) -> Observation: ...
    def proprio(self) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Showing:
    """How an expert's episodes begin and are seen.

    Attributes:
        pictures_every: control steps from one drawn picture to the next; between them the last one stands.
        start_offset_m: the hand begins up to this far from its place, drawn per episode along each axis; 0
            for where the suite puts it.
        geometry: depth, intrinsics and pose of every camera are recorded too.
    """

    pictures_every: int = 1
    start_offset_m: float = 0.0
    geometry: bool = False

    def __post_init__(self) -> None:
        if self.pictures_every < 1:
            raise ValueError(f"pictures_every is {self.pictures_every}; draw every step (1) or fewer (2 and more)")
        if not 0 <= self.start_offset_m <= 0.3:
            raise ValueError(f"start_offset_m is {self.start_offset_m}; give metres from 0 to 0.3")

    def to_dict(self) -> dict[str, Any]:
        """JSON values; without geometry where none is recorded."""
        values = asdict(self)
        return values if self.geometry else {name: value for name, value in values.items() if name != "geometry"}

    def watch(self, simulator: Watched) -> Callable[[], Observation]:
        """What is observed now, at the call of every control step of an episode, the first one's first."""
        drawn: list[Observation] = []

        def look() -> Observation:
            if not drawn or (simulator.t - drawn[0].t) % self.pictures_every == 0:
                seen = simulator.observe(geometry=True) if self.geometry else simulator.observe()
                drawn[:] = [*drawn[:1], seen]
                return seen
            return replace(drawn[-1], proprio=simulator.proprio(), t=simulator.t)

        return look


@dataclass(frozen=True)
class Demonstration(Episode):
    """An episode: what was seen, and what the expert would do then, without the noise that was played.

    Of LIBERO's hand at 20 Hz the state is float32 [T, 8], actions are float32 [T, 7] in [-1, 1]; of Gymnasium
    environments they are what the suite's settings say. Texts are as in `ipvla.sim.recall.labels`.

    Raises:
        ValueError: records or texts are of different lengths, or there are none.
    """

    def __post_init__(self) -> None:
        steps = {
            len(self.state),
            len(self.action),
            *map(len, self.images.values()),
            *map(len, self.geometry.values()),
        }
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
        for camera, recorded in self.geometry.items():
            arrays |= {f"{name}/{camera}": getattr(recorded, name) for name in _GEOMETRY}
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
                    geometry={
                        name[6:]: RecordedGeometry(*(file[f"{part}/{name[6:]}"] for part in _GEOMETRY))
                        for name in file.files
                        if name.startswith("depth/")
                    },
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
                f"{path} is not a complete demonstration ({_reason(path, error)}); delete it and collect it again"
            ) from error


def _reason(path: Path, error: BaseException) -> str:
    what = None if zipfile.is_zipfile(path) else foreign_file(path)  # it is an archive itself
    return what or one_line(error)


def demonstration_of(
    expert: Expert,
    simulator: Simulator,
    seed: int,
    noise: DartNoise | None,
    observe: Callable[[], Observation],
    describe: Callable[[], tuple[str, str, str]] | None = None,
) -> Demonstration | None:
    """One attempt of `expert` at the episode of this seed, from where `simulator` is in it.

    Args:
        noise: on what is played; None for none.
        observe: of `Showing.watch`, or of the simulator itself.
        describe: gives the plan, a question and its answer for the observation just made; None to record none.

    Returns:
        None when the attempt failed or took longer than the task's horizon.
    """
    task, outcome = simulator.task, StepOutcome(success=False, failure=False)
    observations: list[Observation] = []
    actions: list[npt.NDArray[np.float32]] = []
    texts: list[tuple[str, str, str]] = []
    while not outcome.done and len(actions) < task.horizon:
        action = expert.act()
        observations.append(observe())
        actions.append(action.astype(np.float32))
        if describe is not None:
            texts.append(describe())
        outcome = simulator.step(action if noise is None else noise.disturb(action))
    if not outcome.success:
        return None
    reasoning, questions, answers = zip(*texts, strict=True) if texts else ((), (), ())
    return Demonstration(
        task=task.name,
        family=task.family,
        instruction=observations[0].instruction,
        seed=seed,
        images={name: np.stack([seen.images[name] for seen in observations]) for name in observations[0].images},
        state=np.stack([seen.proprio for seen in observations]),
        action=np.stack(actions),
        reasoning=reasoning,
        questions=questions,
        answers=answers,
        geometry={
            name: RecordedGeometry.of([seen.geometry[name] for seen in observations if seen.geometry])
            for name in observations[0].geometry or ()
        },
    )
