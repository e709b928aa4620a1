"""The transforms between environment and model units: one object, used by training and rollout alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from ipvla.contract import Contract
from ipvla.data.conventions import Conventions, FloatArray, IntArray
from ipvla.data.geometry import PointTerms
from ipvla.data.statistics import Statistics
from ipvla.types import NO_TOKEN, ModelInputs, Observation

Tokenize = Callable[[str], Sequence[int]]
#: Most texts repeat from step to step; ECoT's reasoning is another one at each of millions of steps.
_CACHED = 4096
#: Characters of a text in an error.
_SHOWN = 200


@dataclass(frozen=True)
class PromptEncoder:
    """Texts to rows of token ids, NO_TOKEN past their ends. Rows are cached and read-only.

    Attributes:
        tokenize: an instruction to the prompt's token ids, without padding.
        max_prompt_tokens: L, tokens of the longest prompt.
        tokenize_with_state: an instruction and the normalised state [P] to the prompt's token ids, for prompts
            with the state in words; None for others.
        tokenize_text: a plan or an answer to its token ids, without padding; None for `tokenize`.
        tokenize_plan: a plan to its token ids, without padding; None for `tokenize_text`.
        plan_tokens: Lp, tokens of the longest plan. With 0 no plans are read.
        tokenize_question: a question to its prompt's token ids, without padding; None for `tokenize`.
        question_tokens, answer_tokens: Lq and La, tokens of the longest ones. With 0 none are read.
    """

    tokenize: Tokenize
    max_prompt_tokens: int
    tokenize_text: Tokenize | None = None
    plan_tokens: int = 0
    tokenize_question: Tokenize | None = None
    question_tokens: int = 0
    answer_tokens: int = 0
    tokenize_plan: Tokenize | None = None
    tokenize_with_state: Callable[[str, FloatArray], Sequence[int]] | None = None
    _rows: dict[str, dict[str, IntArray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens is {self.max_prompt_tokens}; set it to at least 1")
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

    def prompt(self, instruction: str, state: FloatArray | None = None) -> IntArray:
        """An instruction's prompt, int64 [L]. ValueError if it has more than L tokens.

        Args:
            state: normalised, [P], for prompts that have it in words.
        """
        remedy = "raise it or shorten the instruction"
        if self.tokenize_with_state is not None and state is not None:
            ids = self.tokenize_with_state(instruction, state)
            return _filled(ids, self.max_prompt_tokens, "prompt for", instruction, "max_prompt_tokens", remedy)
        return self._row("prompt for", instruction, self.tokenize, "max_prompt_tokens", remedy)

    def plan(self, text: str) -> IntArray:
        """A plan's tokens, int64 [Lp]; "" has none. ValueError if there are more than Lp."""
        remedy = "raise memory.plan_tokens to {} or shorten the plan"
        return self._row("plan", text, self.tokenize_plan or self.tokenize_text, "plan_tokens", remedy)

    def question(self, text: str) -> IntArray:
        """A question's prompt, int64 [Lq]; "" has none. ValueError if it has more than Lq tokens."""
        remedy = "that is the backbone's longest prompt: shorten the question"
        return self._row("question", text, self.tokenize_question, "question_tokens", remedy)

    def answer(self, text: str) -> IntArray:
        """An answer's tokens, int64 [La]; "" has none. ValueError if there are more than La."""
        remedy = "raise model.questions.tokens to {} or shorten the answer"
        return self._row("answer", text, self.tokenize_text, "answer_tokens", remedy)

    def to_dict(self) -> dict[str, Any]:
        """The limits, as JSON values."""
        names = ("max_prompt_tokens", "plan_tokens", "question_tokens", "answer_tokens")
        return {name: getattr(self, name) for name in names}

    def _row(self, kind: str, text: str, tokenize: Tokenize | None, limit: str, remedy: str) -> IntArray:
        rows = self._rows.setdefault(kind, {})
        row = rows.get(text)
        if row is None:
            empty = not text and kind != "prompt for"  # an instruction without words is a prompt all the same
            ids, longest = () if empty else (tokenize or self.tokenize)(text), getattr(self, limit)
            row = _filled(ids, longest, kind, text, limit, remedy)
            row.flags.writeable = False
            if len(rows) >= _CACHED:
                rows.clear()
            rows[text] = row
        return row


def _filled(ids: Sequence[int], longest: int, kind: str, text: str, limit: str, remedy: str) -> IntArray:
    """int64 [longest], NO_TOKEN past the ids' end. ValueError if there are too many."""
    if len(ids) > longest:
        more = f"{len(ids) - longest} more" if kind == "plan" else "more"
        raise ValueError(
            f"the {kind} {text[:_SHOWN]!r} has {len(ids)} tokens, {more} than {limit} {longest}; "
            + remedy.format(len(ids))
        )
    row = np.full(longest, NO_TOKEN, np.int64)
    row[: len(ids)] = ids
    return row


@dataclass(frozen=True)
class Transforms:
    """Observations to model inputs, actions to targets, and model outputs back to actions.

    Attributes:
        conventions: what the data fix.
        prompts: what the backbone fixes.
        patches: side of the grid of patches whose points the model reads; 0 for a model that reads none.
    """

    conventions: Conventions
    prompts: PromptEncoder
    patches: int = 0

    @property
    def statistics(self) -> Statistics:
        return self.conventions.statistics

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.conventions.cameras

    @property
    def points(self) -> PointTerms | None:
        """What observations must have the geometry of their pictures for; None for pictures alone."""
        return self.conventions.points

    @property
    def chunk(self) -> int:
        return self.conventions.chunk

    @property
    def action_dim(self) -> int:
        return self.conventions.action_dim

    @property
    def contract(self) -> Contract:
        """See `Conventions.contract`."""
        return self.conventions.contract

    def of(self, dataset: str) -> Self:
        """The transforms of one dataset of a mixture, or the only ones. ValueError if it is not in the mixture."""
        return replace(self, conventions=self.conventions.of(dataset))

    def inputs(self, observations: Sequence[Observation]) -> ModelInputs:
        """One row per observation: leading axis [B].

        ValueError for a missing camera, missing geometry where the model reads points, or too long a prompt.
        """
        proprio = self.conventions.proprio(observations)
        states = proprio.numpy()
        ids = np.stack([self.prompts.prompt(o.instruction, s) for o, s in zip(observations, states, strict=True)])
        return ModelInputs(
            images=self.conventions.images(observations),
            proprio=proprio,
            input_ids=torch.from_numpy(ids.clip(min=0)),
            attention_mask=torch.from_numpy(ids != NO_TOKEN),
            points=self.conventions.patch_points(observations, self.patches) if self.patches else None,
        )

    def chunk_targets(
        self, action: FloatArray, t: int | IntArray, state: FloatArray | None = None
    ) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """See `Conventions.chunk_targets`."""
        return self.conventions.chunk_targets(action, t, state)

    def denormalise(
        self, actions: npt.NDArray[np.floating[Any]] | torch.Tensor, state: FloatArray | None = None
    ) -> FloatArray:
        """See `Conventions.denormalise`."""
        return self.conventions.denormalise(actions, state)

    def to_dict(self) -> dict[str, Any]:
        """Both halves as JSON values, without the tokenizers. `Conventions.from_dict` reads its own."""
        return {**self.conventions.to_dict(), **self.prompts.to_dict()}
