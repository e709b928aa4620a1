"""An RLDS dataset in parts: each part is a dataset of its own, of consecutive episodes, in one shard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from ipvla.data.pictures import encoded
from ipvla.data.rlds.format import EPISODES_FILE, SPLIT
from ipvla.data.rlds.layout import RldsLayout, nested
from ipvla.data.rlds.record_writer import create_shard
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory
from ipvla.files import link


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
        labels.append(_label(trajectory))
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


def _label(trajectory: Trajectory) -> dict[str, Any]:
    """What `EPISODES_FILE` says of an episode, so that opening the dataset need not read it."""
    spoken = (*trajectory.texts("language_instruction"), "")[0]
    task, family = (str(trajectory.metadata.get(key, other)) for key, other in (("task", spoken), ("family", "")))
    return {"length": len(trajectory), "task": task, "family": family}


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
