"""Reasoning of Embodied Chain-of-Thought (ECoT; Zawalski et al., arXiv 2407.08693): one control step in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ipvla.reasoning import TAGS

#: Tag, of `TAGS`, to its text, in their order; tags without a text are absent.
Parts: TypeAlias = Mapping[str, str]

#: What a step's entry calls them: in the Bridge file, and in the LIBERO one.
_KEYS = {
    "TASK": ("task",),
    "PLAN": ("plan",),
    "SUBTASK REASONING": ("subtask_reason", "subtask_reasoning"),
    "SUBTASK": ("subtask",),
    "MOVE REASONING": ("move_reason", "movement_reason", "movement_reasoning"),
    "MOVE": ("move", "movement"),
}
_GRIPPER_KEYS = ("gripper_position", "gripper_positions")
#: The gripper's pixel positions that are listed: of this step and of the four that follow.
_GRIPPER_STEPS = 5


def step_parts(entry: Mapping[str, Any], features: Mapping[str, Any], step: int) -> dict[str, str]:
    """One step of a reasoning file, by tag.

    Args:
        entry: the step's own (`task`, `plan`, `subtask`, ...).
        features: of the whole episode: `bboxes` and `gripper_position`, lists with one entry per step.
        step: which of them, counted in the dataset's own episode.

    A missing key, None or an empty text leaves its tag out; nothing is escaped, split or rewritten.
    """
    parts = {tag: _text(next((entry[key] for key in keys if entry.get(key)), None)) for tag, keys in _KEYS.items()}
    parts["VISIBLE OBJECTS"] = _visible_objects(_at(features.get("bboxes"), step))
    positions = next((features[key] for key in _GRIPPER_KEYS if features.get(key)), ())
    parts["GRIPPER POSITION"] = _gripper_positions(positions, step)
    return {tag: parts[tag] for tag in TAGS if parts[tag]}


def render(parts: Parts) -> str:
    """`TAG: text TAG: text`, texts as they are; `ipvla.reasoning.parse` reads it if no text has a tag within."""
    return " ".join(f"{tag}: {parts[tag]}" for tag in TAGS if tag in parts)


@dataclass(frozen=True)
class ReasoningFilter:
    """Which tags of a step's reasoning stay; the stage comes first, dropout next.

    Attributes:
        scheduled_stage: k leaves out the first min(k, 8) tags of `TAGS`, whether they are known or not: 0 keeps
            the full chain of thought, 8 and more keep nothing.
        reasoning_dropout_prob: the probability of *leaving out* each remaining tag, in [0, 1]: 0 keeps all. That
            is what the upstream code does with this number, although the requirement's comment calls it a rate
            of retention; under that reading the documented full chain of thought would need 1.
    """

    scheduled_stage: int = 0
    reasoning_dropout_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.scheduled_stage < 0:
            raise ValueError(f"scheduled_stage is {self.scheduled_stage}; give 0 for all tags, or more")
        if not 0 <= self.reasoning_dropout_prob <= 1:
            raise ValueError(f"reasoning_dropout_prob is {self.reasoning_dropout_prob}; give a number in [0, 1]")

    def __call__(self, parts: Parts, key: Sequence[int] = ()) -> dict[str, str]:
        """The parts that stay. `key`: non-negative integers that the draw is a pure function of."""
        tags = TAGS[self.scheduled_stage :]
        if self.reasoning_dropout_prob and tags:
            # one draw per tag, known or not: a missing key does not move the others' luck
            drawn = np.random.default_rng(tuple(key)).random(len(TAGS)) >= self.reasoning_dropout_prob
            tags = tuple(tag for tag, keep in zip(TAGS, drawn, strict=True) if keep and tag in tags)
        return {tag: parts[tag] for tag in tags if tag in parts}


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _at(per_step: Any, step: int) -> Any:
    return per_step[step] if isinstance(per_step, Sequence) and 0 <= step < len(per_step) else None


def _visible_objects(boxes: Any) -> str:
    """`name [x1, y1, x2, y2], ...` of (score, name, box) triples, pixels."""
    triples = [entry for entry in boxes or () if isinstance(entry, Sequence) and len(entry) == 3]
    return ", ".join(f"{name} {list(box)}" for _, name, box in triples if isinstance(box, Sequence))


def _gripper_positions(positions: Sequence[Any], step: int) -> str:
    """`[x, y, x, y, ...]`, five positions from `step` on, pixels; past the end the last one repeats."""
    if not 0 <= step < len(positions):
        return ""
    ahead = [positions[min(step + i, len(positions) - 1)] for i in range(_GRIPPER_STEPS)]
    if not all(isinstance(position, Sequence) and not isinstance(position, str) for position in ahead):
        return ""
    return str([coordinate for position in ahead for coordinate in position])
