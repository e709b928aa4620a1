"""`python -m ray_jobs.statistics`: reads a dataset once, with all CPUs, for the statistics that training needs.

Training does the same by itself, with one CPU, if this was not done before.

    ipvla statistics --dataset libero_spatial_no_noops
    ipvla statistics --dataset bridge_orig --padded_state true --out bridge.json
    ipvla statistics --dataset /data/my_lerobot_dataset --standard.cameras "{front: observation.images.front}"
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ipvla.data.standards import Standard
from ipvla.data.survey import (
    Survey,
    SurveyPart,
    combined,
    load_survey,
    part_bounds,
    publish_survey,
    survey_part,
    survey_path,
)
from ray_jobs.command_line.cli import run
from ray_jobs.data import DatasetConfig, OpenSource
from ray_jobs.running.cluster import connect
from ray_jobs.running.display import EpisodeProgress


@dataclass(frozen=True)
class StatisticsConfig(DatasetConfig):
    """What to do with the statistics.

    Attributes:
        out: a JSON file to write them to as well, in OpenVLA's schema.
    """

    out: Path | None = None


class PartReader:
    """Surveys parts of a dataset in a process of its own."""

    def __init__(self, open_source: OpenSource, standard: Standard) -> None:
        self._source = open_source()
        self._standard = standard

    def __call__(self, bounds: dict[str, Any]) -> dict[str, bytes]:
        """The part of episodes `first` to `stop`."""
        episodes = range(int(bounds["first"]), int(bounds["stop"]))
        return {"part": pickle.dumps(survey_part(self._source, self._standard, episodes))}


def survey(config: StatisticsConfig) -> tuple[Survey, Path]:
    """The survey and where it is published; read on the cluster if there is none.

    Raises:
        DatasetError: the dataset is missing or damaged, its standard does not fit it, or no episode can be used.
        StorageError: a storage directory cannot be used.
    """
    config.prepare()
    source = config.open_source()
    standard = config.standard_of(source)
    path = survey_path(config.read_root, source, standard)
    result = load_survey(path)
    if result is None:
        with connect(config):
            result = combined(_parts(config.open_source, standard, len(source.lengths)), source, standard)
        publish_survey(path, source.name, result)
    if config.out is not None:
        config.out.expanduser().parent.mkdir(parents=True, exist_ok=True)
        result.statistics.save(config.out.expanduser(), source.name)
    return result, path


def _parts(open_source: OpenSource, standard: Standard, episodes: int) -> Iterator[SurveyPart]:
    """From as many processes as the cluster has CPUs, in any order, with a bar of their episodes."""
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    bounds = [{"first": first, "stop": stop} for first, stop in part_bounds(episodes)]
    readers = max(1, min(len(bounds), int(ray.cluster_resources()["CPU"])))
    rows = ray.data.from_items(bounds, override_num_blocks=len(bounds)).map(
        PartReader,
        fn_constructor_args=(open_source, standard),
        concurrency=(1, readers),
        num_cpus=1,
    )
    with EpisodeProgress() as progress:
        bar = progress.add_task("reading", total=episodes)
        for row in rows.iter_rows():
            part: SurveyPart = pickle.loads(row["part"])
            yield part
            progress.advance(bar, len(part.lengths))


def main(config: StatisticsConfig) -> None:
    """Says what the dataset comes to."""
    console = Console()
    result, path = survey(config)
    size = result.statistics
    print(f"{size.num_transitions} control steps of {size.num_trajectories} episodes: {path}")
    unlabelled = int((~result.labelled & (result.lengths > 0)).sum())
    if unlabelled:
        console.print(f"{unlabelled} episodes have no task in words; statistics count them", style="yellow")
    if result.broken:
        first = next(iter(result.broken.values()))
        console.print(f"{len(result.broken)} episodes cannot be used: {first}", style="yellow", markup=False)


if __name__ == "__main__":
    run(StatisticsConfig, main, __doc__)
