"""The episodic view of ECoT: a source that joins each episode's reasoning to its steps, for lanes to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ipvla.data.reasoning.steps import TAGS, ReasoningFilter, render
from ipvla.data.reasoning.store import ReasoningStore
from ipvla.data.source import EpisodeSource, Feature, Trajectory

#: The step feature under which this project's own datasets record reasoning, and standards read it.
REASONING = "reasoning"


class ReasonedSource:
    """A source whose episodes have the step feature `reasoning`: give it to `EpisodeDataset` in the source's
    place.

    Standards take that feature's text at each step that they keep, by the dataset's own step, and lanes read it as
    plans (`StepBatch.plan`). Nothing is drawn here, for an episode is read once and kept for several epochs: only
    the stage leaves tags out. An episode of which the file says nothing keeps what its dataset recorded.

    Args:
        source: the episodes.
        reasoning: of them.
        scheduled_stage: leaves out the first tags, see `ReasoningFilter`.
        tags: which of the rest are kept, `("PLAN", "SUBTASK")` for a short plan.
    """

    def __init__(
        self,
        source: EpisodeSource,
        reasoning: ReasoningStore,
        scheduled_stage: int = 0,
        tags: tuple[str, ...] = TAGS,
    ) -> None:
        for tag in tags:
            if tag not in TAGS:
                raise ValueError(f"unknown tag {tag!r} of reasoning; use some of {', '.join(TAGS)}")
        self._source, self._reasoning = source, reasoning
        self._kept, self._tags = ReasoningFilter(scheduled_stage), tags

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def location(self) -> str:
        return self._source.location

    @property
    def features(self) -> Mapping[str, Feature]:
        return {**self._source.features, REASONING: Feature("text", (), "str")}

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return self._source.lengths

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._source.tasks

    @property
    def families(self) -> tuple[str, ...]:
        return self._source.families

    def trajectory(self, index: int) -> Trajectory:
        trajectory = self._source.trajectory(index)
        said = self._reasoning.of(trajectory.metadata)
        if not said:
            return trajectory
        texts = {
            step: render({tag: text for tag, text in self._kept(parts).items() if tag in self._tags})
            for step, parts in said.items()
        }
        of_steps = tuple(texts.get(step, "") for step in range(len(trajectory)))
        return replace(trajectory, steps={**trajectory.steps, REASONING: of_steps})
