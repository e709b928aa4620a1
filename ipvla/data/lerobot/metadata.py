"""`meta` of a LeRobotDataset v3, and the dataset that parts make together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ipvla.data.lerobot.format import INFO, STATISTICS, TASK, TASKS, info_values
from ipvla.data.lerobot.layout import Layout
from ipvla.data.lerobot.statistics import Moments, aggregate, json_values
from ipvla.files import link


def assemble(parts: Sequence[Path], directory: Path, layout: Layout, tasks: Mapping[str, int]) -> None:
    """Makes one dataset of all parts, which stay as they are.

    Args:
        parts: their directories, all of them, in order.
        directory: new or empty, in the same file system if the files are not to be copied.
        layout, tasks: of the whole.
    """
    infos = [json.loads((part / INFO).read_text()) for part in parts]
    for part in parts:
        for path in sorted(part.rglob("chunk-*/file-*")):
            link(path, directory / path.relative_to(part))
    statistics = aggregate([json.loads((part / STATISTICS).read_text()) for part in parts])
    episodes, rows = (sum(each[key] for each in infos) for key in ("total_episodes", "total_frames"))
    write_metadata(directory, layout, tasks, statistics, episodes, rows)


def write_metadata(
    directory: Path,
    layout: Layout,
    tasks: Mapping[str, int],
    statistics: Mapping[str, Moments],
    episodes: int,
    rows: int,
) -> None:
    """Writes `meta/info.json`, `meta/stats.json` and `meta/tasks.parquet`; `rows` and `episodes` are how many."""
    import pandas as pd

    info = info_values(
        layout.info_features(),
        fps=layout.fps,
        robot_type=layout.robot_type,
        episodes=episodes,
        frames=rows,
        tasks=len(tasks),
        videos=layout.video is not None,
    )
    (directory / INFO).write_text(json.dumps(info, indent=4, ensure_ascii=False))
    values = {name: json_values(moments) for name, moments in statistics.items()}
    (directory / STATISTICS).write_text(json.dumps(values, indent=4))
    # lerobot looks tasks up by pandas' index, in which the texts are.
    index = pd.Index(list(tasks), dtype=object, name=TASK)
    pd.DataFrame({"task_index": np.array(list(tasks.values()), np.int64)}, index=index).to_parquet(
        directory / TASKS
    )
