"""`python -m ray_jobs.convert`: a dataset from one format to another: RLDS, LeRobotDataset v3, LIBERO's HDF5.

    ipvla convert --source gs://gresearch/robotics/bridge/0.1.0 --to lerobot --name bridge --fps 5
    ipvla convert --source ~/bridge_orig/1.0.0 --to lerobot --name bridge_video --fps 5 --video true
    ipvla convert --source ~/lerobot/pusht --to rlds --name pusht
    ipvla convert --source ~/LIBERO/datasets/libero_goal --to rlds --name libero_goal

Ray Data converts parts of the dataset on all CPUs of the cluster. Each part is read back and compared with the
source before it counts: all numbers and texts are equal, encoded pictures stay the same files, and of video the
difference is shown. A stopped command goes on when it is run again; the dataset appears once it is whole.
On several machines, `data_root_dir` must be a file system that all of them share.

LIBERO's pictures are turned by 180 degrees, as OpenVLA's RLDS has them; its steps that do nothing stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import ray
import ray.data
from rich.console import Console

from ipvla.data.conversion import Comparison, Conversion, ConversionConfig, Part, convert_part, tasks_of_part
from ipvla.data.lerobot import VideoSettings
from ipvla.data.rlds import dataset_directory
from ipvla.data.source import DatasetError
from ipvla.storage import StorageRoots
from ray_jobs.command_line.cli import ending_at_sigterm, run
from ray_jobs.running.cluster import connect
from ray_jobs.running.display import EpisodeProgress


@dataclass(frozen=True)
class ConvertConfig(StorageRoots):
    """What to convert, and to what.

    Attributes:
        source: an RLDS version directory, a LeRobotDataset v3, or a directory of LIBERO's HDF5 files; the first
            two may be addresses in object storage.
        to: "lerobot" or "rlds".
        name: that the dataset gets under `data_root_dir`.
        fps: control steps per second, which RLDS does not state and LeRobot must.
        video: stores pictures as video; by default they stay the files that they are.
        encoding: of video.
        max_mean_difference: the most that pictures of a video may differ on average, in levels of 255.
        robot_type: what the LeRobotDataset says of it.
        file_format: of RLDS's shards: "tfrecord", which every tool reads, or "array_record".
        leave_out: features of the source that the target lacks.
        episodes_per_part: of one file, and of one piece of work.
        skip_bad_episodes: leaves out RLDS episodes that cannot be read.
        num_cpus: of a local cluster; by default as many as the machine has.
    """

    source: str = ""
    to: str = ""
    name: str = ""
    fps: int | None = None
    video: bool = False
    encoding: VideoSettings = field(default_factory=VideoSettings)
    max_mean_difference: float = 6.0
    robot_type: str = ""
    file_format: str = "tfrecord"
    leave_out: tuple[str, ...] = ()
    episodes_per_part: int = 50
    skip_bad_episodes: bool = False
    num_cpus: int | None = None

    def __post_init__(self) -> None:
        if not (self.source and self.to and self.name):
            raise ValueError(
                "say what to convert, to what and under which name: --source ~/bridge_orig/1.0.0 --to lerobot "
                "--name bridge"
            )
        self.build()

    def build(self) -> ConversionConfig:
        """The conversion, with its directory."""
        directory = dataset_directory(self.datasets, self.name) if self.to == "rlds" else self.datasets / self.name
        given: dict[str, Any] = {
            "source": self.source if "://" in self.source else str(Path(self.source).expanduser().resolve()),
            "target": directory,
            "video": self.encoding if self.video and self.to == "lerobot" else None,
        }
        same = {one.name: getattr(self, one.name) for one in fields(ConversionConfig) if one.name not in given}
        return ConversionConfig(**given, **same)


#: Does a piece of work for each part, in any order, and gives what came of it.
Distribute: TypeAlias = Callable[[Callable[[Part], Any], Sequence[Part]], Iterator[tuple[Part, Any]]]


def convert(config: ConversionConfig, distribute: Distribute, console: Console) -> Comparison:
    """Converts what is missing, and publishes the dataset.

    Raises:
        DatasetError: see `Conversion`; if parts fail, the others are converted nevertheless, and stay.
    """
    with Conversion.begin(config) as conversion:
        plan, pending = conversion.plan, conversion.pending()
        done = len(plan.parts) - len(pending)
        if done:
            console.print(f"{done} of {len(plan.parts)} parts are there already")
        if conversion.needs_tasks:
            reading = distribute(partial(tasks_of_part, plan), plan.parts)
            shown = _tell(console, "reading tasks", reading, plan.parts)
            tasks = {part.number: of_part for part, of_part in shown}
            conversion.number_tasks([tasks[part.number] for part in plan.parts])
        converting = distribute(partial(convert_part, conversion.plan), pending)
        for _ in _tell(console, "converting", converting, plan.parts, pending):
            pass
        return conversion.publish()


def with_ray_data(work: Callable[[Part], Any], parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
    """`Distribute` over the connected cluster, one part per task."""
    if not parts:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that there are no bars

    def row(given: dict[str, Any]) -> dict[str, Any]:
        part = parts[given["item"]]
        try:
            return {"part": part, "result": work(part), "error": ""}
        except DatasetError as error:  # the other parts go on
            return {"part": part, "result": None, "error": str(error)}

    numbers = ray.data.from_items(list(range(len(parts))), override_num_blocks=len(parts))
    failed: list[str] = []
    for given in numbers.map(row, num_cpus=1).iter_rows():
        if given["error"]:
            failed.append(given["error"])
        else:
            yield given["part"], given["result"]
    if failed:
        others = f" (and {len(failed) - 1} more parts)" if len(failed) > 1 else ""
        raise DatasetError(f"{failed[0]}{others}")


def _tell(
    console: Console,
    doing: str,
    results: Iterator[tuple[Part, Any]],
    parts: Sequence[Part],
    pending: Sequence[Part] | None = None,
) -> Iterator[tuple[Part, Any]]:
    """The results, with a bar over the episodes of all parts on a terminal."""
    unread = parts if pending is None else pending
    total, left = (sum(part.last - part.first for part in some) for some in (parts, unread))
    with EpisodeProgress(console) as progress:
        bar = progress.add_task(doing, total=total, completed=total - left)
        for part, result in results:
            progress.advance(bar, part.last - part.first)
            yield part, result


def summary(config: ConversionConfig, compared: Comparison) -> str:
    """What there is now, in words."""
    pictures = "pictures are the same"
    if compared.greatest_difference:
        pictures = (
            f"pictures differ by {compared.mean_difference:.2f} levels of 255 on average, and by "
            f"{compared.greatest_difference} at most"
        )
    return (
        f"{compared.episodes} episodes of {compared.steps} steps in {config.target}\n"
        f"numbers and texts are equal, {pictures}\n"
        f"sha256 of the actions: {compared.digest}"
    )


def main(config: ConvertConfig) -> None:
    """Converts, and says what came of it."""
    config.prepare(writes=("data_root_dir",))
    conversion = config.build()
    with ending_at_sigterm(), connect(config, config.num_cpus):
        compared = convert(conversion, with_ray_data, Console(stderr=True))
    print(summary(conversion, compared))


if __name__ == "__main__":
    run(ConvertConfig, main, __doc__)
