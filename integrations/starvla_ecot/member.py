"""One dataset of the mix, with what is known once it was read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from integrations.starvla_ecot.order import IntArray, Visit
from integrations.starvla_ecot.samples import EpisodeNumbers, Frame, views
from ipvla.data.reasoning.store import ReasoningStore, along
from ipvla.data.source import DatasetError, EpisodeSource
from ipvla.data.standards import Standard
from ipvla.data.statistics import Statistics
from ipvla.data.survey import Survey


@dataclass(frozen=True)
class Member:
    """One dataset of the mix.

    Attributes:
        name: under which the mix and the statistics know it.
        source: its episodes as they lie on disk.
        standard: how they become robot episodes.
        survey: of both; broken episodes are left out, and those without an instruction, as OpenVLA does.
        statistics: of the split that is trained on.
        reasoning: of its episodes, None for none.
        weight: how often an episode comes in one epoch, in the mean.
    """

    name: str
    source: EpisodeSource
    standard: Standard
    survey: Survey
    statistics: Statistics
    reasoning: ReasoningStore | None = None
    weight: float = 1.0

    @cached_property
    def lengths(self) -> IntArray:
        """int64 [E], steps per episode; 0 for one that is left out."""
        return np.where(self.survey.labelled, self.survey.lengths, 0)

    def frames(self, visit: Visit) -> list[Frame]:
        """All frames of one episode, pictures encoded. BrokenEpisodeError if it cannot be read."""
        trajectory = self.source.trajectory(visit.episode)
        episode = self.standard.episode(trajectory)
        if len(episode) != self.lengths[visit.episode]:
            raise DatasetError(
                f"{trajectory.where} has {len(episode)} steps after its standard and had "
                f"{self.lengths[visit.episode]} before: the dataset has changed; delete its survey in the cache"
            )
        said = self.reasoning.of(trajectory.metadata) if self.reasoning is not None else {}
        state = self.statistics.proprio.normalise(episode.state) if episode.state.shape[1] else None
        numbers = EpisodeNumbers(
            episode.instruction,
            self.statistics.action.normalise(episode.action),
            state,
            self.standard.absolute,
        )
        steps = zip(episode.raw_step.tolist(), along(said, episode.raw_step), strict=True)
        key = (visit.dataset, visit.episode, visit.copy)
        return [
            Frame(numbers, t, views(episode.pictures, raw), parts, (*key, raw))
            for t, (raw, parts) in enumerate(steps)
        ]
