"""A conversion as it goes on: finished parts stay, and the dataset appears whole once all are there."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import numpy as np

from ipvla import files
from ipvla.data.conversion.comparison import Comparison, actions_sha256, compare
from ipvla.data.conversion.plan import ConversionConfig, LeRobotTarget, Part, Plan, open_source
from ipvla.data.lerobot.format import TASK
from ipvla.data.publish import appearing, exclusive, require_absent
from ipvla.data.recording import Recording
from ipvla.data.source import DatasetError, EpisodeSource
from ipvla.data.standards import STANDARDS

REPORT = "conversion.json"
_PLAN = "plan.json"


class Conversion:
    """One conversion under way.

    A part is converted by `convert_part`, anywhere; LeRobot's tasks have numbers, so before that `tasks_of_part`
    of all parts goes to `number_tasks`. `publish` makes the dataset of all parts.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @classmethod
    @contextmanager
    def begin(cls, config: ConversionConfig) -> Iterator[Self]:
        """Begins, or goes on where a conversion with the same settings stopped.

        Raises:
            DatasetError: the target exists, another process is writing it, the source cannot be converted, or what
                was begun has other settings.
        """
        require_absent(config.target)
        with exclusive(config.target):
            plan = config.build()
            begun = config.work / _PLAN
            if begun.exists() and begun.read_text() != plan.fingerprint:
                raise DatasetError(
                    f"{config.work} holds parts of a conversion with other settings, or of another source; delete "
                    "that directory, or give the settings that it was begun with"
                )
            config.work.mkdir(parents=True, exist_ok=True)
            for remainder in config.work.glob(".*.incomplete"):
                shutil.rmtree(remainder)
            begun.write_text(plan.fingerprint)
            yield cls(plan)

    @property
    def needs_tasks(self) -> bool:
        """Do tasks have to be numbered before parts can be converted?"""
        return isinstance(self.plan.target, LeRobotTarget)

    def number_tasks(self, found: list[list[str]]) -> None:
        """Takes the tasks of all parts, in order."""
        assert isinstance(self.plan.target, LeRobotTarget)
        tasks = {
            text: number for number, text in enumerate(dict.fromkeys(text for part in found for text in part))
        }
        self.plan = replace(self.plan, target=replace(self.plan.target, tasks=tasks))

    def pending(self) -> list[Part]:
        """Parts that are not there yet."""
        return [part for part in self.plan.parts if not part_directory(self.plan, part).exists()]

    def publish(self) -> Comparison:
        """Makes the dataset, checks its counts and some of its actions, and removes the parts.

        Raises:
            DatasetError: parts are missing, or the whole is not what its parts are.
        """
        if self.pending():
            raise DatasetError(
                f"{len(self.pending())} of {len(self.plan.parts)} parts are missing; convert them first"
            )
        directories = [part_directory(self.plan, part) for part in self.plan.parts]
        whole = Comparison.together([_read(directory) for directory in directories])
        with appearing(self.plan.config.target) as building:
            self.plan.target.assemble(directories, building)
            _check(self.plan.target.open(building), whole, str(building))
            (building / REPORT).write_text(json.dumps(_report(self.plan, whole), indent=2))
            _recording(_source(self.plan.config)).save(building)
        shutil.rmtree(self.plan.config.work)
        return whole


def _recording(source: EpisodeSource) -> Recording:
    """How the source was recorded; the converted dataset has another name, by which nobody would know it."""
    known = STANDARDS[source.name](source.name).contract(0) if source.name in STANDARDS else None
    recording = Recording.of(source)
    if known is None:
        return recording
    contract = recording.over(known)
    unit_m = recording.depth_unit_m
    return Recording(contract.pictures.orientation, contract.control_hz, depth_unit_m=unit_m)


def part_directory(plan: Plan, part: Part) -> Path:
    """Where a part is once it is converted and compared."""
    return plan.config.work / f"part-{part.number:05d}"


def tasks_of_part(plan: Plan, part: Part) -> list[str]:
    """The tasks in words of a part's episodes, in the order in which they come first."""
    source = _source(plan.config)
    tasks = (plan.columns.apply(source.trajectory(index)).texts(TASK) for index in range(part.first, part.last))
    return list(dict.fromkeys(text for texts in tasks for text in texts or ("",)))


def convert_part(plan: Plan, part: Part) -> Comparison:
    """Writes a part, reads it back, compares it with the source, and only then gives it its name.

    Raises:
        DatasetError: an episode cannot be read or written, or is not the same when it is read back.
    """
    done = part_directory(plan, part)
    if done.exists():
        return _read(done)
    source, episodes = _source(plan.config), range(part.first, part.last)
    with files.appearing(done) as building:
        plan.target.write(building, part, (plan.columns.apply(source.trajectory(i)) for i in episodes))
        comparison = _compare(plan, source, plan.target.open(building), episodes)
        (building / REPORT).write_text(json.dumps(asdict(comparison)))
    return comparison


def _compare(plan: Plan, source: EpisodeSource, written: EpisodeSource, episodes: range) -> Comparison:
    if len(written.lengths) != len(episodes):
        raise DatasetError(f"{len(episodes)} episodes were to be written, and {len(written.lengths)} were")
    comparison = Comparison.together(
        [
            compare(plan.columns.apply(source.trajectory(index)), written.trajectory(place))
            for place, index in enumerate(episodes)
        ]
    )
    allowed = plan.config.max_mean_difference if plan.config.video else 0.0
    if comparison.mean_difference > allowed:
        raise DatasetError(
            f"pictures of episodes {episodes.start} to {episodes.stop - 1} differ by "
            f"{comparison.mean_difference:.2f} levels on average, more than {allowed:g}; lower crf, or "
            "raise max_mean_difference"
        )
    return comparison


@functools.lru_cache(maxsize=2)
def _source(config: ConversionConfig) -> EpisodeSource:
    """Opened once per process."""
    return open_source(config.source, config.work, config.skip_bad_episodes)


def _read(directory: Path) -> Comparison:
    return Comparison.from_dict(json.loads((directory / REPORT).read_text()))


def _check(source: EpisodeSource, whole: Comparison, name: str) -> None:
    """The counts of all episodes, and the actions of the first and the last."""
    if (len(source.lengths), int(np.sum(source.lengths))) != (whole.episodes, whole.steps):
        raise DatasetError(f"{name} has {len(source.lengths)} episodes, and its parts have {whole.episodes}")
    for index in {0, whole.episodes - 1}:
        if actions_sha256(source.trajectory(index)) != whole.actions_sha256[index]:
            raise DatasetError(f"{name}: episode {index} has other actions than in its part")


def _report(plan: Plan, whole: Comparison) -> dict[str, object]:
    return {
        "source": plan.config.source,
        "episodes": whole.episodes,
        "steps": whole.steps,
        "actions_sha256": whole.digest,
        "greatest_difference": whole.greatest_difference,
        "mean_difference": whole.mean_difference,
        "features": {column.source: column.target for column in plan.columns.columns},
    }
