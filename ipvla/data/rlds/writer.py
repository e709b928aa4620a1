"""Writes episodes as an RLDS dataset that appears whole, by one rename, or not at all."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from ipvla.data.geometry import geometry_features, geometry_steps
from ipvla.data.pictures import EncodedPictures, encode_png, encoded
from ipvla.data.publish import appearing, exclusive
from ipvla.data.recording import OWN_DESCRIPTION, Recording
from ipvla.data.rlds.format import (
    EPISODES_FILE,
    SPLIT,
    STATISTICS_FILE,
    RldsLayout,
    dataset_directory,
    image_key,
    nested,
    of_success,
    task_and_family,
)
from ipvla.data.rlds.records import create_shard
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory
from ipvla.data.statistics import Statistics
from ipvla.files import link
from ipvla.geometry import DEPTH_UNIT_M
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
        actions: list[npt.NDArray[np.float32]] = []
        states: list[npt.NDArray[np.float32]] = []
        trajectories = _trajectories(first, remaining, camera_size, actions, states)
        parts: list[Path] = []
        while (head := next(trajectories, None)) is not None:
            parts.append(building / ".parts" / f"{len(parts):05d}")
            write_part(parts[-1], layout, chain([head], islice(trajectories, _EPISODES_PER_SHARD - 1)))
        assemble(parts, building, layout)
        shutil.rmtree(building / ".parts")
        Statistics.compute(actions, states).save(building / STATISTICS_FILE, name)
        (replace(recording, depth_unit_m=DEPTH_UNIT_M) if first.geometry else recording).save(building)
    return target


def _trajectories(
    first: Episode, others: Iterable[Episode], camera_size: int, actions: list[Any], states: list[Any]
) -> Iterator[Trajectory]:
    """All episodes, checked; their actions and states are added to the lists, for the statistics."""
    for episode in chain([first], others):
        _check(episode, first, camera_size)
        actions.append(np.array(episode.action, np.float32))
        states.append(np.array(episode.state, np.float32))
        yield _trajectory(episode, bool(first.questions))


def _layout(name: str, first: Episode, camera_size: int, recording: Recording) -> RldsLayout:
    """LIBERO's features, `reasoning`, and geometry and questions if the first episode has some."""
    pictures = {
        _picture(camera): Feature("image", (camera_size, camera_size, 3), "uint8") for camera in first.images
    }
    depths: dict[str, Feature] = {}
    rate = "unknown" if recording.control_hz is None else f"{recording.control_hz:g}"
    for camera, recorded in first.geometry.items():
        depths |= geometry_features(_picture(camera), recorded)
    texts = ("language_instruction", "reasoning", *(("question", "answer") if first.questions else ()))
    features = {
        **pictures,
        **depths,
        "observation/state": Feature("number", first.state.shape[1:]),
        "action": Feature("number", first.action.shape[1:]),
        **dict.fromkeys(texts, _TEXT),
        **dict.fromkeys(("reward", "discount"), Feature("number")),
        **dict.fromkeys(("is_first", "is_last", "is_terminal"), _FLAG),
    }
    return RldsLayout(
        name,
        features,
        dict.fromkeys([*pictures, *(path for path, feature in depths.items() if feature.is_depth)], "png"),
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
    _check_geometry(episode, first, (length, camera_size, camera_size), where)
    expected = (length, camera_size, camera_size, 3)
    for camera, frames in episode.images.items():
        if frames.shape != expected or frames.dtype != np.uint8:
            raise DatasetError(f"{where}, {camera!r}: {frames.dtype} {frames.shape}, expected uint8 {expected}")


def _check_geometry(episode: Episode, first: Episode, shape: tuple[int, int, int], where: str) -> None:
    if set(episode.geometry) != set(first.geometry):
        raise DatasetError(
            f"{where} has geometry of cameras {sorted(episode.geometry)}, the first one of "
            f"{sorted(first.geometry)}; collect all of them again"
        )
    for camera, recorded in episode.geometry.items():
        if recorded.depth.shape != shape or recorded.unit_m != DEPTH_UNIT_M:
            raise DatasetError(
                f"{where}, {camera!r}: depth {recorded.depth.shape} in units of {recorded.unit_m} m, expected "
                f"{shape} in units of {DEPTH_UNIT_M} m"
            )


def _encoded(frames: npt.NDArray[np.uint8]) -> list[bytes]:
    """Each frame as PNG; one that repeats the frame before it is not encoded again."""
    encoded: list[bytes] = []
    for t, frame in enumerate(frames):
        again = t > 0 and np.array_equal(frame, frames[t - 1])
        encoded.append(encoded[-1] if again else encode_png(frame))
    return encoded


def _trajectory(episode: Episode, questions: bool) -> Trajectory:
    length = len(episode.action)
    steps: dict[str, Steps] = {
        _picture(camera): EncodedPictures(_encoded(frames)) for camera, frames in episode.images.items()
    }
    for camera, recorded in episode.geometry.items():
        steps |= geometry_steps(_picture(camera), recorded)
    steps |= {
        "observation/state": np.asarray(episode.state, np.float32),
        "action": np.asarray(episode.action, np.float32),
        "language_instruction": (episode.instruction,) * length,
        "reasoning": episode.reasoning or ("",) * length,
        **of_success(length),
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


def write_part(directory: Path, layout: RldsLayout, trajectories: Iterable[Trajectory]) -> None:
    """Writes one part whole.

    Args:
        directory: new or empty.
        layout: of the whole dataset.
        trajectories: with the layout's names; encoded pictures are written as they are, others as PNG.

    Raises:
        DatasetError: there are no episodes, or one lacks a feature or has other shapes than the layout.
    """
    directory.mkdir(parents=True, exist_ok=True)
    info = layout.builder_info(str(directory))
    serializer = example_serializer.ExampleSerializer(info.features.get_serialized_info())
    writer = create_shard(directory / _shard_name(layout, 0, 1), layout.file_format)
    labels: list[dict[str, Any]] = []
    size = 0
    for trajectory in trajectories:
        example = _example(trajectory, layout)
        try:
            record = serializer.serialize_example(info.features.encode_example(example))
        except Exception as error:  # tfds raises what its features do
            raise DatasetError(f"{trajectory.where} does not fit the dataset's features: {error}") from error
        writer.write(record)
        size += len(record)
        task, family = task_and_family(trajectory)
        labels.append({"length": len(trajectory), "task": task, "family": family})
    writer.close()
    if not labels:
        raise DatasetError(f"{directory} would have no episodes; give at least one")
    (directory / EPISODES_FILE).write_text(json.dumps(labels))
    _write_info(directory, layout, [len(labels)], size)


def assemble(parts: Sequence[Path], directory: Path, layout: RldsLayout) -> None:
    """Makes one dataset of all parts, which stay as they are.

    Args:
        parts: their directories, all of them, in order.
        directory: new or empty, in the same file system if the files are not to be copied.
        layout: of the whole.
    """
    lengths: list[int] = []
    labels: list[Any] = []
    size = 0
    for number, part in enumerate(parts):
        (split,) = json.loads((part / "dataset_info.json").read_text())["splits"]
        lengths.append(int(split["shardLengths"][0]))
        size += int(split["numBytes"])
        labels += json.loads((part / EPISODES_FILE).read_text())
        link(part / _shard_name(layout, 0, 1), directory / _shard_name(layout, number, len(parts)))
    (directory / EPISODES_FILE).write_text(json.dumps(labels))
    _write_info(directory, layout, lengths, size)


def _shard_name(layout: RldsLayout, shard: int, shards: int) -> str:
    return f"{layout.name}-{SPLIT}.{layout.file_format}-{shard:05d}-of-{shards:05d}"


def _write_info(directory: Path, layout: RldsLayout, lengths: list[int], size: int) -> None:
    info = layout.builder_info(str(directory))
    info.set_file_format(layout.file_format)
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=layout.name, split=SPLIT, filetype_suffix=layout.file_format
    )
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    info.set_splits(tfds.core.SplitDict([split]))
    info.write_to_directory(directory)


def _example(trajectory: Trajectory, layout: RldsLayout) -> dict[str, Any]:
    columns = {path: _values(trajectory, path, feature) for path, feature in layout.features.items()}
    steps = [nested(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    missing = sorted(set(layout.metadata) - set(trajectory.metadata))
    if missing:
        raise DatasetError(f"{trajectory.where} has no metadata {missing}, which the first episode has")
    return {"steps": steps, "episode_metadata": nested(dict(_metadata(trajectory.metadata, layout.metadata)))}


def _values(trajectory: Trajectory, path: str, feature: Feature) -> Iterable[Any]:
    if feature.kind == "image":
        # tfds writes what is in a file object as it is, and would want TensorFlow to encode an array.
        return map(io.BytesIO, encoded(trajectory.pictures(path)))
    if feature.kind == "text":
        return trajectory.texts(path) or ("",) * len(trajectory)
    values: Steps = trajectory.numbers(path)
    assert isinstance(values, np.ndarray)
    return values.astype(feature.dtype, copy=False)


def _metadata(values: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[tuple[str, Any]]:
    for name, feature in features.items():
        value = values[name]
        yield name, (value or "") if feature.kind == "text" else np.asarray(value, feature.dtype)
