"""The episodic view of ECoT: a source that joins each episode's reasoning to its steps, for lanes to read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ipvla.choices import did_you_mean
from ipvla.data.reasoning.steps import render
from ipvla.data.reasoning.store import ReasoningStore, Unmatched, open_store
from ipvla.data.source import BrokenEpisodeError, EpisodeSource, Feature, Trajectory
from ipvla.reasoning import TAGS

#: The step feature under which this project's own datasets record reasoning, and standards read it.
REASONING = "reasoning"


#: So many episodes, spread evenly over a dataset, are looked at to see whether a reasoning file is about it.
_LOOKED_AT = 32


@dataclass(frozen=True)
class Coverage:
    """How many of the episodes that were looked at have reasoning.

    Attributes:
        found, looked: episodes.
        unmatched: why the first of the others has none, if there is one.
    """

    found: int
    looked: int
    unmatched: Unmatched | None = None

    def __str__(self) -> str:
        """Without paths: logs may be public."""
        reason = f": {self.unmatched.reason}" if self.unmatched and not self.found else ""
        return f"{self.found} of {self.looked} episodes have reasoning{reason}"


def coverage(source: EpisodeSource, reasoning: ReasoningStore) -> Coverage:
    """Looks at some episodes of a dataset, evenly spread; unreadable ones do not count."""
    numbers = np.unique(np.linspace(0, len(source.lengths) - 1, _LOOKED_AT).astype(int))
    found = looked = 0
    unmatched = None
    for number in numbers.tolist():
        try:
            metadata = source.trajectory(number).metadata
        except BrokenEpisodeError:
            continue
        looked += 1
        if reasoning.of(metadata):
            found += 1
        else:
            unmatched = unmatched or reasoning.unmatched(metadata)
    return Coverage(found, looked, unmatched)


class ReasonedSource(EpisodeSource):
    """A source whose episodes have the step feature `reasoning`: `EpisodeDataset` reads it beside the source.

    Standards take that feature's text at each step that they keep, by the dataset's own step, and lanes read it as
    plans (`StepBatch.plan`). An episode that the file lacks keeps what its dataset recorded.

    Args:
        source: the episodes.
        reasoning: of them.
        tags: which are used, `("PLAN", "SUBTASK")` for a short plan.
    """

    def __init__(self, source: EpisodeSource, reasoning: ReasoningStore, tags: tuple[str, ...] = TAGS) -> None:
        for tag in tags:
            if tag not in TAGS:
                raise ValueError(f"unknown tag {tag!r} of reasoning; use some of {', '.join(TAGS)}")
        self._source, self._reasoning, self._tags = source, reasoning, tags
        self.name, self.inner_name, self.location = source.name, source.inner_name, source.location
        self.format, self.fps, self.broken = source.format, source.fps, source.broken
        self.lengths, self.tasks, self.families = source.lengths, source.tasks, source.families
        self.features = {**source.features, REASONING: Feature("text", (), "str")}

    def coverage(self) -> Coverage:
        """See the function of this name."""
        return coverage(self._source, self._reasoning)

    def _trajectory(self, index: int) -> Trajectory:
        trajectory = self._source.trajectory(index)
        reasoning = self._reasoning.of(trajectory.metadata)
        if not reasoning:
            return trajectory
        texts = {
            step: render({tag: text for tag, text in parts.items() if tag in self._tags})
            for step, parts in reasoning.items()
        }
        of_steps = tuple(texts.get(step, "") for step in range(len(trajectory)))
        return replace(trajectory, steps={**trajectory.steps, REASONING: of_steps})


@dataclass(frozen=True)
class ReasoningConfig:
    """Reasoning of Embodied Chain-of-Thought (ECoT) for the episodes of a dataset.

    Attributes:
        path: ECoT's reasoning file (.json), or what was compiled from one (.sqlite). A published file that is not
            there is fetched from Hugging Face by its name.
        stage: k leaves the first min(k, 8) tags out; 0 keeps the whole chain of thought.
        dropped: further tags that are left out, e.g. [VISIBLE OBJECTS, GRIPPER POSITION].
    """

    path: Path
    stage: int = 0
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stage < 0:
            raise ValueError(f"data.reasoning.stage is {self.stage}; give 0 for all tags, or more")
        for tag in self.dropped:
            if tag not in TAGS:
                raise ValueError(f"data.reasoning.dropped: {tag!r} is no tag; {did_you_mean(tag, TAGS)}")
        if not self.tags:
            raise ValueError(
                f"data.reasoning: stage {self.stage} and dropped {list(self.dropped)} leave no tag; keep at least "
                "one, or set data.reasoning to null"
            )

    @property
    def tags(self) -> tuple[str, ...]:
        """Those that are trained on, in their order."""
        return tuple(tag for tag in TAGS[self.stage :] if tag not in self.dropped)

    def build(self, source: EpisodeSource, cache: Path) -> ReasonedSource:
        """The same episodes with their reasoning.

        Args:
            cache: directory for the compiled form of a JSON file.

        Raises:
            DatasetError: the file is missing and cannot be fetched, or is no reasoning file.
        """
        return ReasonedSource(source, open_store(self.path, cache), tags=self.tags)
