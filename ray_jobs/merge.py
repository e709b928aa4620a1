"""`python -m ray_jobs.merge`: one journal from those of several machines that shared a study's episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipvla.rollout.journal import Journal
from ray_jobs.command_line.cli import run


@dataclass(frozen=True)
class MergeConfig:
    """Which journals to merge.

    Attributes:
        journals: files that `ray_jobs.evaluate` wrote (`runs/STUDY/NAME/episodes.sqlite`), of one study.
        into: the file to write, or to add to.
    """

    journals: tuple[Path, ...] = ()
    into: Path | None = None

    def __post_init__(self) -> None:
        if self.into is None or not self.journals:
            raise ValueError(
                'name what to merge and where to: --journals "[a.sqlite, b.sqlite]" --into all.sqlite'
            )


def main(config: MergeConfig) -> None:
    """Merges, and says how many episodes there are."""
    assert config.into is not None
    with Journal.merged(config.journals, config.into) as journal:
        print(f"{len(journal.results())} episodes of {len(config.journals)} journals in {config.into}")


if __name__ == "__main__":
    run(MergeConfig, main, __doc__)
