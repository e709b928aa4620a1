"""A LeRobotDataset v3 in one call, of the parts that conversions write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from ipvla.data.lerobot.format import Layout
from ipvla.data.lerobot.writer import PartWriter, assemble
from ipvla.data.publish import appearing, exclusive
from ipvla.data.source import DatasetError, Trajectory

#: Of pictures of 256 px, about 100 MB, lerobot's own size of a file.
EPISODES_PER_PART = 50


def write_lerobot(
    target: Path, layout: Layout, trajectories: Iterable[Trajectory], episodes_per_part: int = EPISODES_PER_PART
) -> Path:
    """Writes the dataset's directory, `meta`, `data` and perhaps `videos`; returns it.

    Args:
        target: the directory, which must not exist.
        layout: features by LeRobot's names, frame rate, images or video.
        trajectories: with those names, and `task` in words at each step; written in this order, never held in
            memory together. Encoded pictures are written as they are, others as PNG, unless there is video.
        episodes_per_part: in one parquet file, and in one video per camera.

    Raises:
        DatasetError: the dataset exists, another process is writing it, or an episode does not fit the layout.
    """
    with exclusive(target), appearing(target) as building:
        tasks: dict[str, int] = {}
        parts: list[Path] = []
        episodes = rows = 0
        remaining = iter(trajectories)
        for first in remaining:
            parts.append(building / ".parts" / f"{len(parts):05d}")
            writer = PartWriter(parts[-1], layout, len(parts) - 1, episodes, rows, tasks)
            for trajectory in chain([first], islice(remaining, episodes_per_part - 1)):
                writer.add(trajectory)
            writer.close()
            episodes, rows = episodes + writer.episodes, rows + writer.rows
        if not parts:
            raise DatasetError(f"dataset {target} would have no episodes; give at least one")
        assemble(parts, building, layout, tasks)
        shutil.rmtree(building / ".parts")
    return target
