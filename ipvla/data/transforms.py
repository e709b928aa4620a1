"""The transforms between environment and model units: one object, used by training and rollout alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ipvla.data.chunks import PAST_END, PastEnd, past_the_end
from ipvla.data.gripper import GRIPPERS, Gripper, environment_gripper
from ipvla.data.normalisation import NORMALISATIONS, Normalisation
from ipvla.data.statistics import Statistics
from ipvla.types import ModelInputs, Observation

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

#: Plans repeat from step to step; ECoT's reasoning is another text at each of millions of steps.
_PLANS_CACHED = 4096


@dataclass(frozen=True)
class Transforms:
    """Observations to model inputs, actions to targets, and model outputs back to actions.

    Attributes:
        statistics: of the training data; all P proprioception and A action dimensions.
        tokenize: an instruction to the prompt's token ids, without padding.
        max_prompt_tokens: L; prompts are padded to it at the end, with id 0.
        cameras: names, in the order of the view axis V.
        image_size: height and width the model takes, pixels; other frames are resized (Lanczos, antialiased).
        chunk: C, actions per target.
        proprio_index: the proprioception columns the model sees, None for all.
        tokenize_plan: a plan in text to its token ids, without padding; None for `tokenize`.
        plan_tokens: Lp; plans are padded to it at the end, with id 0. With 0 no plans are read.
        tokenize_question: a question in text to its prompt's token ids, without padding; None for `tokenize`.
        question_tokens, answer_tokens: Lq and La; questions and answers are padded to them as plans are, answers
            are tokenised as plans are. With 0 none are read.
        normalisation: of actions and proprioception.
        past_end: what a chunk holds past its episode's end.
        absolute: bool [A], action dimensions that tell where to be rather than how to move; None for the last
            alone, the gripper.
        gripper: how the statistics' dataset tells the gripper.
        mixed: statistics of every dataset of a mixture, by its name; `of` gives the transforms with one of them.
    """

    statistics: Statistics
    tokenize: Callable[[str], Sequence[int]]
    max_prompt_tokens: int
    cameras: tuple[str, ...]
    image_size: int
    chunk: int
    proprio_index: tuple[int, ...] | None = None
    tokenize_plan: Callable[[str], Sequence[int]] | None = None
    plan_tokens: int = 0
    tokenize_question: Callable[[str], Sequence[int]] | None = None
    question_tokens: int = 0
    answer_tokens: int = 0
    normalisation: Normalisation = "bounds_q99"
    past_end: PastEnd = "mask"
    absolute: tuple[bool, ...] | None = None
    gripper: Gripper = "environment"
    mixed: Mapping[str, Statistics] = field(default_factory=dict)
    _prompts: dict[str, tuple[IntArray, npt.NDArray[np.bool_]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _plans: dict[str, IntArray] = field(default_factory=dict, init=False, repr=False, compare=False)
    _questions: dict[str, IntArray] = field(default_factory=dict, init=False, repr=False, compare=False)
    _answers: dict[str, IntArray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "image_size", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to at least 1")
        if self.plan_tokens < 0:
            raise ValueError(
                f"plan_tokens is {self.plan_tokens}; set it to 0 for no plans, or to the longest one's"
            )
        if min(self.question_tokens, self.answer_tokens) < 0 or bool(self.question_tokens) != bool(
            self.answer_tokens
        ):
            raise ValueError(
                f"question_tokens is {self.question_tokens} and answer_tokens {self.answer_tokens}; "
                "set both to 0 for no questions, or to the longest ones'"
            )
        if not self.cameras:
            raise ValueError("cameras is empty; name at least one, e.g. ('agentview',)")
        known = self.statistics.proprio.dim
        if self.proprio_index is not None and not all(0 <= i < known for i in self.proprio_index):
            raise ValueError(f"proprio_index {self.proprio_index} leaves the {known} columns; use 0..{known - 1}")
        choices = {"normalisation": NORMALISATIONS, "past_end": PAST_END, "gripper": GRIPPERS}
        for name, known_values in choices.items():
            if getattr(self, name) not in known_values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known_values)}")
        self.statistics.action.require(self.normalisation)
        self.statistics.proprio.require(self.normalisation)
        if self.absolute is not None and len(self.absolute) != self.action_dim:
            raise ValueError(f"absolute tells of {len(self.absolute)} action dimensions of {self.action_dim}")

    @property
    def action_dim(self) -> int:
        return self.statistics.action.dim

    @property
    def proprio_dim(self) -> int:
        return self.statistics.proprio.dim if self.proprio_index is None else len(self.proprio_index)

    @property
    def conventions(self) -> dict[str, Any]:
        """The attributes by which actions and proprioception are told, for transforms of the same units."""
        names = ("statistics", "normalisation", "absolute", "gripper", "mixed")
        return {name: getattr(self, name) for name in names}

    def of(self, dataset: str) -> Self:
        """The transforms of one dataset of a mixture, or the only ones. ValueError if it is not in the mixture."""
        if not self.mixed:
            return self
        if dataset not in self.mixed:
            raise ValueError(f"dataset {dataset!r} is not in the mixture; choose among {', '.join(self.mixed)}")
        return replace(self, statistics=self.mixed[dataset])

    def inputs(self, observations: Sequence[Observation]) -> ModelInputs:
        """One row per observation: leading axis [B]. ValueError for a missing camera or too long a prompt."""
        prompts = [self._prompt(o.instruction) for o in observations]
        states = np.stack([o.proprio for o in observations]).astype(np.float32)
        proprio = self.statistics.proprio.normalise(states, self.normalisation)
        if self.proprio_index is not None:
            proprio = proprio[:, list(self.proprio_index)]
        return ModelInputs(
            images=self.images(observations),
            proprio=torch.from_numpy(proprio),
            input_ids=torch.from_numpy(np.stack([ids for ids, _ in prompts])),
            attention_mask=torch.from_numpy(np.stack([mask for _, mask in prompts])),
        )

    def images(self, observations: Sequence[Observation]) -> torch.Tensor:
        """The pictures of `inputs` alone, uint8 [B, V, H, W, 3]."""
        views = [np.stack([self._image(o, camera) for camera in self.cameras]) for o in observations]
        return torch.from_numpy(np.stack(views))

    def require_prompt(self, instruction: str) -> None:
        """ValueError if the instruction's prompt is too long."""
        self._prompt(instruction)

    def plan(self, text: str) -> IntArray:
        """A plan's tokens, int64 [Lp], read-only because they are cached; "" is all 0.

        Raises:
            ValueError: the plan has more than Lp tokens.
        """
        if text not in self._plans:
            ids = (self.tokenize_plan or self.tokenize)(text) if text else ()
            if len(ids) > self.plan_tokens:
                raise ValueError(
                    f"the plan {text!r} has {len(ids)} tokens, {len(ids) - self.plan_tokens} more than "
                    f"plan_tokens {self.plan_tokens}; raise memory.plan_tokens to {len(ids)} or shorten the plan"
                )
            if len(self._plans) >= _PLANS_CACHED:
                self._plans.clear()
            self._plans[text] = _read_only(ids, self.plan_tokens)
        return self._plans[text]

    def question(self, text: str) -> IntArray:
        """A question's prompt, int64 [Lq], read-only because it is cached; "" is all 0.

        Raises:
            ValueError: the prompt has more than Lq tokens.
        """
        if text not in self._questions:
            ids = (self.tokenize_question or self.tokenize)(text) if text else ()
            if len(ids) > self.question_tokens:
                raise ValueError(
                    f"the question {text!r} has {len(ids)} tokens, more than question_tokens "
                    f"{self.question_tokens}, the backbone's longest prompt; shorten the question"
                )
            self._questions[text] = _read_only(ids, self.question_tokens)
        return self._questions[text]

    def answer(self, text: str) -> IntArray:
        """An answer's tokens, int64 [La], read-only because they are cached; "" is all 0.

        Raises:
            ValueError: the answer has more than La tokens.
        """
        if text not in self._answers:
            ids = (self.tokenize_plan or self.tokenize)(text) if text else ()
            if len(ids) > self.answer_tokens:
                raise ValueError(
                    f"the answer {text!r} has {len(ids)} tokens, more than answer_tokens {self.answer_tokens}; "
                    f"raise model.questions.tokens to {len(ids)} or shorten the answer"
                )
            self._answers[text] = _read_only(ids, self.answer_tokens)
        return self._answers[text]

    def chunk_targets(self, action: FloatArray, t: int | IntArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """The next `chunk` actions from control step(s) `t` of one episode.

        Args:
            action: float32 [T, A], the episode's actions in environment units.
            t: control steps, any shape [...], in [0, T).

        Returns:
            float32 [..., C, A], normalised; and bool [..., C], True where it is a target. What they are past the
            end is `past_end`'s to say: by default the last action repeats there and is no target.
        """
        steps = np.asarray(t)[..., None] + np.arange(self.chunk)
        recorded = action[np.minimum(steps, len(action) - 1)]
        target = self.statistics.action.normalise(recorded, self.normalisation)
        absolute = self.absolute or (False,) * (self.action_dim - 1) + (True,)
        return past_the_end(target, steps < len(action), self.past_end, absolute)

    def denormalise(self, actions: npt.NDArray[np.floating[Any]] | torch.Tensor) -> FloatArray:
        """Model output [..., A] to environment units, float32: arm within [-1, 1], gripper exactly -1 or +1.

        Whatever the dataset's convention, -1 opens and +1 closes. Actions without a gripper stay in the dataset's
        units, unclipped.
        """
        y = actions.detach().float().cpu().numpy() if isinstance(actions, torch.Tensor) else actions
        x = self.statistics.action.denormalise(np.asarray(y, np.float32), self.normalisation)
        if self.gripper == "none":
            return x
        x = x.clip(-1, 1)
        x[..., -1] = environment_gripper(x[..., -1], self.gripper)
        return x

    def to_dict(self) -> dict[str, Any]:
        """All but the tokenizers, as JSON values."""
        return {
            "statistics": self.statistics.to_dict(),
            "max_prompt_tokens": self.max_prompt_tokens,
            "cameras": list(self.cameras),
            "image_size": self.image_size,
            "chunk": self.chunk,
            "proprio_index": None if self.proprio_index is None else list(self.proprio_index),
            "plan_tokens": self.plan_tokens,
            "question_tokens": self.question_tokens,
            "answer_tokens": self.answer_tokens,
            "normalisation": self.normalisation,
            "past_end": self.past_end,
            "absolute": None if self.absolute is None else list(self.absolute),
            "gripper": self.gripper,
            **({"mixed": {name: one.to_dict() for name, one in self.mixed.items()}} if self.mixed else {}),
        }

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        tokenize: Callable[[str], Sequence[int]],
        tokenize_plan: Callable[[str], Sequence[int]] | None = None,
        tokenize_question: Callable[[str], Sequence[int]] | None = None,
    ) -> Self:
        """The inverse of `to_dict`; what a setting was before it existed is its default."""
        index, absolute = values["proprio_index"], values.get("absolute")
        return cls(
            statistics=Statistics.from_dict(values["statistics"]),
            tokenize=tokenize,
            max_prompt_tokens=values["max_prompt_tokens"],
            cameras=tuple(values["cameras"]),
            image_size=values["image_size"],
            chunk=values["chunk"],
            proprio_index=None if index is None else tuple(index),
            tokenize_plan=tokenize_plan,
            plan_tokens=values.get("plan_tokens", 0),
            tokenize_question=tokenize_question,
            question_tokens=values.get("question_tokens", 0),
            answer_tokens=values.get("answer_tokens", 0),
            normalisation=values.get("normalisation", "bounds_q99"),
            past_end=values.get("past_end", "mask"),
            absolute=None if absolute is None else tuple(absolute),
            gripper=values.get("gripper", "environment"),
            mixed={name: Statistics.from_dict(one) for name, one in values.get("mixed", {}).items()},
        )

    def _image(self, observation: Observation, camera: str) -> npt.NDArray[np.uint8]:
        if camera not in observation.images:
            raise ValueError(f"no camera {camera!r} in the observation; it has {sorted(observation.images)}")
        image = observation.images[camera]
        size = (self.image_size, self.image_size)
        if image.shape[:2] == size:
            return image
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))

    def _prompt(self, instruction: str) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        if instruction not in self._prompts:
            ids = self.tokenize(instruction)
            if len(ids) > self.max_prompt_tokens:
                raise ValueError(
                    f"the prompt for {instruction!r} has {len(ids)} tokens, more than "
                    f"max_prompt_tokens {self.max_prompt_tokens}; raise it or shorten the instruction"
                )
            mask = np.arange(self.max_prompt_tokens) < len(ids)
            self._prompts[instruction] = _padded(ids, self.max_prompt_tokens), mask
        return self._prompts[instruction]


def _padded(ids: Sequence[int], length: int) -> IntArray:
    padded = np.zeros(length, np.int64)
    padded[: len(ids)] = ids
    return padded


def _read_only(ids: Sequence[int], length: int) -> IntArray:
    padded = _padded(ids, length)
    padded.flags.writeable = False
    return padded
