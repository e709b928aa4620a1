"""The settings of reasoning that is read from a file beside the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipvla.choices import did_you_mean
from ipvla.data.reasoning.episodes import ReasonedSource
from ipvla.data.reasoning.store import open_store
from ipvla.data.source import EpisodeSource
from ipvla.reasoning import TAGS


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
