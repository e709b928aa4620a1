"""Writes episodes as an RLDS dataset that appears whole, by one rename, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.publish import appearing, exclusive
from ipvla.data.recording import OWN_DESCRIPTION, Recording
from ipvla.data.rlds.format import STATISTICS_FILE, dataset_directory, image_key
from ipvla.data.rlds.layout import RldsLayout
from ipvla.data.rlds.parts import assemble, write_part
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory
from ipvla.data.statistics import Statistics
from ipvla.types import Episode

_EPISODES_PER_SHARD = 256
#: How this project's suites are recorded.
_OWN = Recording("upright", 20.0)
_TEXT, _FLAG = Feature("text", (), "str"), Feature("number", (), "bool")


def write_rlds(
    data_root: Path,
    name: str,
    episodes: Iterable[Episode],
    camera_size: int,
    recording: Recording = _OWN,
) -> Path:
    """Writes `<data_root>/<name>/1.0.0/` with its shards, statistics and episode index; returns that directory.

    Args:
        data_root: the directory of all datasets.
        name: letters, digits and underscores, starting with a letter.
        episodes: written in this order; never held in memory together.
        camera_size: height and width of every frame, pixels.
        recording: how the episodes were recorded; by default as this project's suites are.

    Raises:
        DatasetError: the dataset exists, another process is writing it, or an episode does not fit the others.
    """
    target = dataset_directory(data_root, name)
    with exclusive(target), appearing(target) as building:
        remaining = iter(episodes)
        first = next(remaining, None)
        if first is None:
            raise DatasetError(f"dataset {name!r} would have no episodes; give at least one")
        layout = _layout(name, first, camera_size, recording)
        written = _Written()
        trajectories = written.trajectories(first, remaining, camera_size)
        parts: list[Path] = []
        while (head := next(trajectories, None)) is not None:
            parts.append(building / ".parts" / f"{len(parts):05d}")
            write_part(parts[-1], layout, chain([head], islice(trajectories, _EPISODES_PER_SHARD - 1)))
        assemble(parts, building, layout)
        shutil.rmtree(building / ".parts")
        Statistics.compute(written.actions, written.states).save(building / STATISTICS_FILE, name)
        recording.save(building)
    return target


class _Written:
    """The actions and states of all episodes that have been written, for the statistics."""

    def __init__(self) -> None:
        self.actions: list[npt.NDArray[np.float32]] = []
        self.states: list[npt.NDArray[np.float32]] = []

    def trajectories(self, first: Episode, others: Iterable[Episode], camera_size: int) -> Iterator[Trajectory]:
        for episode in chain([first], others):
            _check(episode, first, camera_size)
            yield _trajectory(episode, bool(first.questions))
            self.actions.append(np.array(episode.action, np.float32))
            self.states.append(np.array(episode.state, np.float32))


def _layout(name: str, first: Episode, camera_size: int, recording: Recording) -> RldsLayout:
    """LIBERO's features, `reasoning`, and questions if the first episode has some."""
    pictures = {
        _picture(camera): Feature("image", (camera_size, camera_size, 3), "uint8") for camera in first.images
    }
    rate = "unknown" if recording.control_hz is None else f"{recording.control_hz:g}"
    texts = ("language_instruction", "reasoning", *(("question", "answer") if first.questions else ()))
    features = {
        **pictures,
        "observation/state": Feature("number", first.state.shape[1:]),
        "action": Feature("number", first.action.shape[1:]),
        **dict.fromkeys(texts, _TEXT),
        **dict.fromkeys(("reward", "discount"), Feature("number")),
        **dict.fromkeys(("is_first", "is_last", "is_terminal"), _FLAG),
    }
    return RldsLayout(
        name,
        features,
        dict.fromkeys(pictures, "png"),
        {"task": _TEXT, "family": _TEXT, "seed": Feature("number", (), "int64"), "file_path": _TEXT},
        "array_record",
        f"{OWN_DESCRIPTION}: one record is one episode, {rate} control steps per second.",
    )


def _check(episode: Episode, first: Episode, camera_size: int) -> None:
    where = f"episode of task {episode.task!r}, seed {episode.seed}"
    if set(episode.images) != set(first.images):
        raise DatasetError(
            f"{where} has cameras {sorted(episode.images)}, the first one had {sorted(first.images)}"
        )
    length = len(episode.action)
    if not length:
        raise DatasetError(f"{where} has no steps; leave it out")
    if len(episode.state) != length:
        raise DatasetError(f"{where} has {len(episode.state)} states for {length} actions; record one per action")
    recorded = {"reasonings": episode.reasoning, "questions": episode.questions, "answers": episode.answers}
    for name, texts in recorded.items():
        if texts and len(texts) != length:
            raise DatasetError(
                f"{where} has {len(texts)} {name} for {length} actions; record one per action, or none"
            )
    if len(episode.questions) != len(episode.answers):
        raise DatasetError(f"{where} has questions or answers alone; record both, or neither")
    if episode.questions and not first.questions:
        raise DatasetError(f"{where} has questions, the first one had none; collect all of them again")
    if not (np.isfinite(episode.state).all() and np.isfinite(episode.action).all()):
        raise DatasetError(f"{where} has states or actions that are not finite; leave it out")
    expected = (length, camera_size, camera_size, 3)
    for camera, frames in episode.images.items():
        if frames.shape != expected or frames.dtype != np.uint8:
            raise DatasetError(f"{where}, {camera!r}: {frames.dtype} {frames.shape}, expected uint8 {expected}")


def _trajectory(episode: Episode, questions: bool) -> Trajectory:
    length = len(episode.action)
    last = np.arange(length) == length - 1
    steps: dict[str, Steps] = {
        _picture(camera): EncodedPictures([encode_png(frame) for frame in frames])
        for camera, frames in episode.images.items()
    }
    steps |= {
        "observation/state": np.asarray(episode.state, np.float32),
        "action": np.asarray(episode.action, np.float32),
        "language_instruction": (episode.instruction,) * length,
        "reasoning": episode.reasoning or ("",) * length,
        # Only successes are recorded, so the reward is 1 where the episode ends.
        "reward": last.astype(np.float32),
        "discount": np.ones(length, np.float32),
        "is_first": np.arange(length) == 0,
        "is_last": last,
        "is_terminal": last,
    }
    if questions:
        steps |= {
            "question": episode.questions or ("",) * length,
            "answer": episode.answers or ("",) * length,
        }
    metadata = {
        "task": episode.task,
        "family": episode.family,
        "seed": episode.seed,
        "file_path": f"{episode.task}/{episode.seed}",
    }
    return Trajectory(steps, f"episode of task {episode.task!r}, seed {episode.seed}", metadata)


def _picture(camera: str) -> str:
    return f"observation/{image_key(camera)}"
