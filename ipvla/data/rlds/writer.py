"""Writes episodes as an RLDS dataset that appears whole, by one rename, or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow_datasets as tfds

from ipvla.data.episode import EpisodeRecord
from ipvla.data.pictures import encode_png
from ipvla.data.publish import appearing, exclusive
from ipvla.data.rlds.format import (
    EPISODES_FILE,
    SPLIT,
    STATISTICS_FILE,
    VERSION,
    dataset_directory,
    image_key,
    rlds_features,
)
from ipvla.data.source import DatasetError
from ipvla.data.statistics import Statistics

_EPISODES_PER_SHARD = 256


def write_rlds(data_root: Path, name: str, episodes: Iterable[EpisodeRecord], camera_size: int) -> Path:
    """Writes `<data_root>/<name>/1.0.0/` with its shards, statistics and episode index; returns that directory.

    Args:
        data_root: the directory of all datasets.
        name: letters, digits and underscores, starting with a letter.
        episodes: written in this order; never held in memory together.
        camera_size: height and width of every frame, pixels.

    Raises:
        DatasetError: the dataset exists, another process is writing it, or an episode does not fit the others.
    """
    target = dataset_directory(data_root, name)
    with exclusive(target), appearing(target) as building:
        _write_version(building, name, episodes, camera_size)
    return target


def _write_version(directory: Path, name: str, episodes: Iterable[EpisodeRecord], camera_size: int) -> None:
    states: list[npt.NDArray[np.float32]] = []
    actions: list[npt.NDArray[np.float32]] = []
    labels: list[dict[str, Any]] = []
    cameras: set[str] = set()
    questions = False
    writer = None
    for episode in episodes:
        if writer is None:
            cameras, questions = set(episode.images), bool(episode.questions)
            writer = _open_writer(directory, name, episode, camera_size)
        _check(episode, cameras, camera_size, questions)
        writer.add_examples({SPLIT: [_example(episode, questions)]})
        states.append(np.array(episode.state, np.float32))
        actions.append(np.array(episode.action, np.float32))
        labels.append({"length": len(episode.action), "task": episode.task, "family": episode.family})
    if writer is None:
        raise DatasetError(f"dataset {name!r} would have no episodes; give at least one")
    writer.close_all()
    Statistics.compute(actions, states).save(directory / STATISTICS_FILE, name)
    (directory / EPISODES_FILE).write_text(json.dumps(labels))


def _open_writer(directory: Path, name: str, first: EpisodeRecord, camera_size: int) -> Any:
    shapes = dict.fromkeys(first.images, (camera_size, camera_size, 3))
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name="ipvla.data.rlds"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=rlds_features(shapes, first.state.shape[1], first.action.shape[1], bool(first.questions)),
        description="Demonstrations recorded by ipvla: one record is one episode, 20 control steps per second.",
    )
    writer = tfds.core.SequentialWriter(info, _EPISODES_PER_SHARD, file_format="array_record")
    writer.initialize_splits([SPLIT])
    return writer


def _check(episode: EpisodeRecord, cameras: set[str], camera_size: int, questions: bool) -> None:
    where = f"episode of task {episode.task!r}, seed {episode.seed}"
    if set(episode.images) != cameras:
        raise DatasetError(f"{where} has cameras {sorted(episode.images)}, the first one had {sorted(cameras)}")
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
    if episode.questions and not questions:
        raise DatasetError(f"{where} has questions, the first one had none; collect all of them again")
    if not (np.isfinite(episode.state).all() and np.isfinite(episode.action).all()):
        raise DatasetError(f"{where} has states or actions that are not finite; leave it out")
    expected = (length, camera_size, camera_size, 3)
    for camera, frames in episode.images.items():
        if frames.shape != expected or frames.dtype != np.uint8:
            raise DatasetError(f"{where}, {camera!r}: {frames.dtype} {frames.shape}, expected uint8 {expected}")


def _example(episode: EpisodeRecord, questions: bool) -> dict[str, Any]:
    last = len(episode.action) - 1
    texts = {"reasoning": episode.reasoning}
    if questions:
        texts |= {"question": episode.questions, "answer": episode.answers}
    steps = [
        {
            "observation": {
                **{image_key(camera): _png(frames[t]) for camera, frames in episode.images.items()},
                "state": np.asarray(episode.state[t], np.float32),
            },
            "action": np.asarray(episode.action[t], np.float32),
            "language_instruction": episode.instruction,
            **{feature: each[t] if each else "" for feature, each in texts.items()},
            # Only successes are recorded, so the reward is 1 where the episode ends.
            "reward": np.float32(t == last),
            "discount": np.float32(1.0),
            "is_first": t == 0,
            "is_last": t == last,
            "is_terminal": t == last,
        }
        for t in range(last + 1)
    ]
    metadata = {
        "task": episode.task,
        "family": episode.family,
        "seed": episode.seed,
        "file_path": f"{episode.task}/{episode.seed}",
    }
    return {"steps": steps, "episode_metadata": metadata}


def _png(rgb: npt.NDArray[np.uint8]) -> io.BytesIO:
    # tfds writes bytes from a file object as they are; given an array it would call TensorFlow to encode.
    return io.BytesIO(encode_png(rgb))
