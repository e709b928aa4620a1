"""Random access to the episodes of an RLDS dataset, TFRecord or array_record, without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ipvla.data.pictures import EncodedPictures
from ipvla.data.rlds.format import (
    EPISODES_FILE,
    FILE_FORMATS,
    SPLIT,
    VERSION_NAME,
    dataset_name,
    flat,
    task_and_family,
)
from ipvla.data.rlds.index import EpisodeEntry, EpisodeIndex
from ipvla.data.rlds.records import CorruptRecordError, ShardRecords, open_shard
from ipvla.data.source import (
    BrokenEpisodeError,
    DatasetError,
    EpisodeSource,
    Feature,
    Steps,
    Trajectory,
    file_system,
    refuse_foreign,
)
from ipvla.files import json_of, one_line

logger = logging.getLogger(__name__)

_COLLECT_AGAIN = "delete the dataset and collect or copy it again"
#: Metadata of tfds beside the shards: everything that is small.
_METADATA = (".json", ".txt")


class RldsSource(EpisodeSource):
    """The episodes of one split; safe to use from several threads.

    Opening a dataset that has no list of its episodes reads it once, which also checks every record.

    Args:
        location: the version directory, `<data_root>/recall/1.0.0`, or its address in object storage.
        split: name of it.
        index_root: directory for the list of episodes, for the next opening; None to store none.
        skip_bad_episodes: leave out episodes that cannot be read, and count them in `broken`.

    Attributes:
        file_format: "tfrecord" or "array_record".

    Raises:
        DatasetError: the directory is missing or no RLDS dataset, a shard is missing, the split is empty.
        BrokenEpisodeError: an episode cannot be read, and is not to be skipped.
    """

    def __init__(
        self,
        location: str | Path,
        split: str = SPLIT,
        *,
        index_root: Path | None = None,
        skip_bad_episodes: bool = False,
    ) -> None:
        self.location = str(location).rstrip("/")
        self._skips = skip_bad_episodes
        files, root = file_system(self.location)
        builder = _open_builder(self.location, files, root)
        self.inner_name = str(builder.name)
        self.name = dataset_name(self.location, builder)
        self._tfds_features = builder.info.features
        if "steps" not in self._tfds_features:
            raise DatasetError(f"{self.location} has no feature `steps`; it is no RLDS dataset of episodes")
        self.features = dict(_features(self._tfds_features["steps"].feature))
        self.file_format = _file_format(self.location, builder)
        self.format = f"RLDS, {self.file_format}"
        self._names, self._expected = _shards(self.location, builder, split)
        self._check_shards(files, root)
        self._records: dict[int, ShardRecords] = {}
        self._index = self._open_index(files, root, index_root, split)
        self.broken = self._index.broken
        self.lengths = self._index.lengths
        self.tasks, self.families = self._index.tasks, self._index.families
        if self.broken:
            logger.warning("%s: %d episodes are left out: %s", self.location, len(self.broken), self.broken[0])

    def _trajectory(self, index: int) -> Trajectory:
        shard, offset, size = self._index.place(index)
        return self._read(shard, offset, size, f"episode {index}")

    def _read(self, shard: int, offset: int, size: int, episode: str) -> Trajectory:
        where = f"{self.name}: {self._path(shard)}, {episode}"
        try:
            record = self._shard(shard).read(offset, size)
        except CorruptRecordError as error:
            raise BrokenEpisodeError(f"{where} is corrupt ({one_line(error)}); {_COLLECT_AGAIN}") from error
        try:
            example = self._tfds_features.deserialize_example_np(
                record, decoders={"steps": tfds.decode.SkipDecoding()}
            )
            steps = {path: _steps(example["steps"], path, feature) for path, feature in self.features.items()}
        except Exception as error:  # tfds raises what its protocol buffers do
            varying = [path for path, f in self.features.items() if f.kind == "number" and 0 in f.shape]
            remedy = _COLLECT_AGAIN
            if varying:
                remedy = f"{', '.join(varying)} may be of any length, which is not read; write a fixed one"
            raise BrokenEpisodeError(
                f"{where} is not what features.json says ({type(error).__name__}: {one_line(error)}); {remedy}"
            ) from error
        rows = {len(values) for values in steps.values()}
        if len(rows) != 1 or not min(rows):
            raise BrokenEpisodeError(f"{where} has features of {sorted(rows)} steps; {_COLLECT_AGAIN}")
        metadata = flat(example.get("episode_metadata", {}))
        texts = {path: value.decode() for path, value in metadata.items() if isinstance(value, bytes)}
        return Trajectory(steps, where, metadata | texts)

    def _shard(self, shard: int) -> ShardRecords:
        if shard not in self._records:
            try:
                self._records[shard] = open_shard(self._path(shard), self.file_format)
            except Exception as error:
                refuse_foreign(self._path(shard))
                raise DatasetError(
                    f"shard {self._path(shard)} cannot be opened ({one_line(error)}); {_COLLECT_AGAIN}"
                ) from error
        return self._records[shard]

    def _path(self, shard: int) -> str:
        return f"{self.location}/{self._names[shard]}"

    def _check_shards(self, files: Any, root: str) -> None:
        there = {Path(entry["name"]).name: entry.get("size") for entry in files.ls(root, detail=True)}
        for name in self._names:
            if name not in there:
                raise DatasetError(f"shard {self.location}/{name} is missing; {_COLLECT_AGAIN}")

    def _open_index(self, files: Any, root: str, index_root: Path | None, split: str) -> EpisodeIndex:
        labels = self._labels(files, root)
        if index_root is None or labels is not None:  # what the dataset lists itself need not be stored
            return self._make_index(labels)
        sizes = [[name, files.size(f"{root}/{name}")] for name in self._names]
        key = hashlib.sha256(json.dumps([self.location, split, self._skips, sizes]).encode()).hexdigest()[:16]
        path = index_root / f"{self.name}-{key}.npy"
        index = EpisodeIndex.load(path)
        if index is None:
            index = self._make_index(None)
            index.save(path)
        return index

    def _make_index(self, labels: Sequence[Mapping[str, Any]] | None) -> EpisodeIndex:
        broken: list[str] = []
        index = EpisodeIndex.of(self._entries(labels, broken), broken)
        if not len(index):
            raise DatasetError(
                f"{self.location} has no readable episodes; {broken[0] if broken else _COLLECT_AGAIN}"
            )
        return index

    def _entries(self, labels: Sequence[Mapping[str, Any]] | None, broken: list[str]) -> Iterator[EpisodeEntry]:
        number = 0
        for shard, expected in enumerate(self._expected):
            for offset, size in self._places(shard, expected, broken):
                if labels is not None:
                    label = labels[number]
                    yield EpisodeEntry(shard, offset, size, label["length"], label["task"], label["family"])
                else:
                    try:
                        trajectory = self._read(shard, offset, size, f"episode {number}")
                    except BrokenEpisodeError as error:
                        if not self._skips:
                            raise
                        broken.append(str(error))
                    else:
                        task, family = task_and_family(trajectory)
                        yield EpisodeEntry(shard, offset, size, len(trajectory), task, family)
                number += 1

    def _places(self, shard: int, expected: int, broken: list[str]) -> Iterable[tuple[int, int]]:
        """Of the records of a shard; all of them, or as many as can be found if bad ones are skipped."""
        places: list[tuple[int, int]] = []
        reason = ""
        try:
            places.extend(self._shard(shard).places())
        except CorruptRecordError as error:
            reason = f" ({error})"
        if len(places) != expected:
            refuse_foreign(self._path(shard))
            message = (
                f"shard {self._path(shard)} is truncated or corrupt{reason}: {len(places)} of {expected} episodes "
                f"are readable; {_COLLECT_AGAIN}"
            )
            if not self._skips:
                raise DatasetError(message)
            broken += [message] * (expected - len(places))
        return places

    def _labels(self, files: Any, root: str) -> list[dict[str, Any]] | None:
        """Of datasets that this project wrote; None where episodes must be read."""
        path = f"{root}/{EPISODES_FILE}"
        if not files.exists(path):
            return None
        try:
            labels: list[dict[str, Any]] = json_of(files.cat_file(path))
            for label in labels:
                if not (isinstance(length := label["length"], int) and 0 < length < 2**31):
                    raise ValueError(f"an episode of length {length!r:.60}")
                if not isinstance(label["task"], str) or not isinstance(label["family"], str):
                    raise ValueError("a task or family that is no text")
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{self.location}/{EPISODES_FILE} is damaged ({one_line(error)}); delete that file and it will be "
                "done without"
            ) from None
        if len(labels) != sum(self._expected):
            raise DatasetError(
                f"{self.location}/{EPISODES_FILE} lists {len(labels)} episodes of {sum(self._expected)}; "
                f"{_COLLECT_AGAIN}"
            )
        return labels


def _open_builder(location: str, files: Any, root: str) -> Any:
    if not files.isdir(root):
        parent = root.rstrip("/").rpartition("/")[0]
        there = sorted(Path(path).parent.name for path in files.glob(f"{parent}/*/dataset_info.json"))
        others = f"; beside it there is {', '.join(there)}" if there else ""
        raise DatasetError(
            f"dataset directory {location} does not exist; collect it first or correct the path{others}"
        )
    names = [Path(path).name for path in files.ls(root, detail=False)]
    if "dataset_info.json" not in names:
        raise DatasetError(f"{location} holds no dataset_info.json; {_nearby(location, files, root)}")
    if "features.json" not in names:
        raise DatasetError(f"{location} holds no features.json, which says what its records are; copy it again")
    try:
        # tfds wants a directory: a copy of the metadata does as well for one that is far away.
        with tempfile.TemporaryDirectory() as copied:
            for name in names:
                if name.endswith(_METADATA) and name != EPISODES_FILE:
                    files.get_file(f"{root}/{name}", f"{copied}/{name}")
            builder = tfds.builder_from_directory(copied)
            builder.info.features  # noqa: B018  # read while the copy is there
            return builder
    except Exception as error:  # tfds raises what its protocol buffers do
        unknown = re.search(r'has no field named "(\w+)"', str(error))
        if unknown:
            raise DatasetError(
                f"{location} has metadata with a field {unknown[1]!r} that tensorflow-datasets {tfds.__version__} "
                "does not know: a newer one wrote them; install that one, or take the field out of the JSON files"
            ) from None
        for name in ("dataset_info.json", "features.json"):
            refuse_foreign(f"{location}/{name}")
        raise DatasetError(f"{location} has unreadable metadata ({one_line(error)}); {_COLLECT_AGAIN}") from None


def _nearby(location: str, files: Any, root: str) -> str:
    """What to do about a directory that is no version's: versions lie one or two levels below, or one above."""
    subdirectories = [
        str(path).removeprefix(root).rpartition("/")[0]
        for pattern in ("*", "*/*")
        for path in files.glob(f"{root}/{pattern}/dataset_info.json")
    ]
    versions = sorted(
        (path for path in subdirectories if VERSION_NAME.fullmatch(path.rpartition("/")[2])),
        key=lambda path: [int(part) for part in path.rpartition("/")[2].split(".")],
    )
    if versions:
        return f"did you mean {location}{versions[-1]}?"
    above = root.rstrip("/").rpartition("/")[0]
    lerobot = sorted(str(path).split("/")[-3] for path in files.glob(f"{root}/*/meta/info.json"))
    if lerobot:
        several = f" It has {', '.join(lerobot[:9])}" if len(lerobot) > 1 else ""
        return f"did you mean the LeRobotDataset {location}/{lerobot[0]}?{several}"
    if files.exists(f"{above}/meta/info.json"):
        return f"did you mean the LeRobotDataset {location.rpartition('/')[0]}?"
    if files.exists(f"{above}/dataset_info.json"):
        return f"did you mean {location.rpartition('/')[0]}?"
    if subdirectories:
        names = ", ".join(path.strip("/") for path in subdirectories)
        return f"it has {names}, and a version's directory is three numbers"
    return "give an RLDS version directory"


def _file_format(location: str, builder: Any) -> str:
    name = getattr(builder.info.file_format, "value", None)
    if name not in FILE_FORMATS:
        raise DatasetError(
            f"{location} is stored as {name or 'an unknown format'}; known are {' and '.join(FILE_FORMATS)}: "
            "convert it with `tfds convert_format`"
        )
    if name == "array_record" and "://" in location and not location.startswith("file://"):
        raise DatasetError(
            f"{location}: array_record is read from local disks only; copy the directory to one, or make TFRecord "
            "of it there: ipvla convert --to rlds"
        )
    return str(name)


def _shards(location: str, builder: Any, split: str) -> tuple[list[str], list[int]]:
    if split not in builder.info.splits:
        raise DatasetError(
            f"{location} has no split {split!r}, only {sorted(builder.info.splits)}: {split!r} is what is read; "
            "copy that one too, or write the dataset with it"
        )
    info = builder.info.splits[split]
    if not info.num_examples:
        raise DatasetError(f"{location}: split {split!r} has no episodes; {_COLLECT_AGAIN}")
    try:
        return [Path(path).name for path in info.filepaths], list(info.shard_lengths)
    except ValueError as error:
        raise DatasetError(
            f"{location}/dataset_info.json names its shards by a pattern that is none ({one_line(error)}); "
            f"{_COLLECT_AGAIN}"
        ) from None


def _features(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Feature]]:
    """Of a step, flat; what is neither picture nor text nor number is left out."""
    for name, feature in tree.items():
        path = f"{prefix}{name}"
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _features(feature, f"{path}/")
        elif isinstance(feature, tfds.features.Image):
            yield (
                path,
                Feature("image", tuple(size or 0 for size in feature.shape), np.dtype(feature.np_dtype).name),
            )
        elif isinstance(feature, tfds.features.Tensor | tfds.features.Scalar):
            shape = tuple(size or 0 for size in feature.shape)
            if feature.np_dtype in (np.object_, np.str_):
                if not shape:
                    yield path, Feature("text", (), "str")
            else:
                yield path, Feature("number", shape, np.dtype(feature.np_dtype).name)


def _steps(steps: Mapping[str, Any], path: str, feature: Feature) -> Steps:
    values: Any = steps
    for name in path.split("/"):
        values = values[name]
    if not isinstance(values, list) and not np.ndim(values):
        raise ValueError(f"it has no steps/{path}")
    if feature.kind == "image":
        return EncodedPictures(tuple(map(bytes, values)))
    if feature.kind == "text":
        decoded = {text: text.decode() for text in set(values)}  # few differ, and equal ones share their memory
        return tuple(decoded[text] for text in values)
    return np.asarray(values)
