"""Random access to the episodes of an RLDS dataset in array_record format."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from ipvla.data.byte_cache import ByteCache
from ipvla.data.rlds.episode import EncodedEpisode
from ipvla.data.rlds.format import EPISODES_FILE, SPLIT, STATISTICS_FILE, DatasetError, camera_of
from ipvla.data.statistics import Statistics
from ipvla.types import Observation

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_COLLECT_AGAIN = "delete the dataset and collect or copy it again"


class EpisodeDataset:
    """The episodes of one dataset, by index; safe to use from several threads.

    Args:
        directory: the version directory, e.g. `<data_root>/recall/1.0.0`.
        cache_bytes: bound on the encoded episodes and decoded frames kept in memory.

    Attributes:
        name: the dataset's.
        lengths: int64 [E], control steps per episode.
        tasks, families: one name per episode; a dataset that has none gives the instruction and "".

    Raises:
        DatasetError: the directory is missing or no RLDS dataset, or a shard is missing, truncated or corrupt.
    """

    def __init__(self, directory: Path, cache_bytes: int = 1 << 30) -> None:
        self.directory = directory
        builder = _open_builder(directory)
        self.name: str = builder.name
        self._features = builder.info.features
        self._image_keys = _image_keys(directory, self._features)
        self._shards = _open_shards(directory, builder.info.splits[SPLIT])
        self._first = np.concatenate([[0], np.cumsum([shard.records for shard in self._shards])])
        self._read_lock = threading.Lock()
        self._episodes = ByteCache[int, EncodedEpisode](cache_bytes // 4, lambda episode: episode.nbytes)
        self._frames = ByteCache[tuple[int, int, str], npt.NDArray[np.uint8]](
            cache_bytes - cache_bytes // 4, lambda frame: frame.nbytes
        )
        labels = self._labels()
        self.lengths: npt.NDArray[np.int64] = np.array([label["length"] for label in labels], np.int64)
        self.tasks: tuple[str, ...] = tuple(label["task"] for label in labels)
        self.families: tuple[str, ...] = tuple(label["family"] for label in labels)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(camera_of(key) for key in self._image_keys)

    @property
    def step_features(self) -> frozenset[str]:
        """What an episode's steps may have recorded, by the features' names."""
        return frozenset(self._features["steps"].feature)

    def episode(self, index: int) -> EncodedEpisode:
        """Raises DatasetError if the record is corrupt, IndexError outside [0, len)."""
        return self._episodes.get(index, lambda: self._read(index))

    def frame(self, index: int, t: int, camera: str) -> npt.NDArray[np.uint8]:
        """One decoded frame, uint8 [H, W, 3] RGB, read-only because it is cached."""
        return self._frames.get((index, t, camera), lambda: self._decode(index, t, camera))

    def observation(self, index: int, t: int, cameras: Sequence[str]) -> Observation:
        """What the demonstrator saw at control step `t`, as a simulator would give it."""
        episode = self.episode(index)
        images = {camera: self.frame(index, t, camera) for camera in cameras}
        return Observation(images, episode.state[t], episode.instruction, t)

    def statistics(self) -> Statistics:
        """Read from the file beside the shards, or computed from all episodes if there is none.

        Raises:
            ValueError: the file is not in OpenVLA's schema, or of another action size than the episodes.
        """
        path = self.directory / STATISTICS_FILE
        if path.is_file():
            return Statistics.load(path, self._features["steps"].feature["action"].shape[0])
        episodes = [self._read(index) for index in range(len(self))]
        return Statistics.compute([e.action for e in episodes], [e.state for e in episodes])

    def _decode(self, index: int, t: int, camera: str) -> npt.NDArray[np.uint8]:
        frame = self.episode(index).image(t, camera)
        frame.flags.writeable = False
        return frame

    def _read(self, index: int) -> EncodedEpisode:
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} is outside the {len(self)} episodes of {self.directory}")
        shard_index = int(np.searchsorted(self._first, index, side="right")) - 1
        shard = self._shards[shard_index]
        try:
            with self._read_lock:  # The C++ reader seeks.
                record = shard.reader.read([index - int(self._first[shard_index])])[0]
            example = self._features.deserialize_example_np(record, decoders={"steps": tfds.decode.SkipDecoding()})
        except Exception as error:
            raise DatasetError(f"{shard.path} is corrupt at episode {index}; {_COLLECT_AGAIN}") from error
        return _episode(example, self._image_keys)

    def _labels(self) -> list[dict[str, Any]]:
        path = self.directory / EPISODES_FILE
        if not path.is_file():  # A dataset of other hands: read it through once.
            episodes = (self._read(index) for index in range(len(self)))
            return [{"length": len(e), "task": e.task, "family": e.family} for e in episodes]
        try:
            labels: list[dict[str, Any]] = json.loads(path.read_text())
        except ValueError:
            raise DatasetError(f"{path} is no JSON; delete that file and it will be done without") from None
        if len(labels) != len(self):
            raise DatasetError(f"{path} lists {len(labels)} episodes of {len(self)}; {_COLLECT_AGAIN}")
        return labels


@dataclass(frozen=True)
class _Shard:
    path: Path
    reader: Any
    records: int


def _open_builder(directory: Path) -> Any:
    if not directory.is_dir():
        raise DatasetError(f"dataset directory {directory} does not exist; collect it first or correct the path")
    if not (directory / "dataset_info.json").is_file():
        versions = sorted(path.parent.name for path in directory.glob("*/dataset_info.json"))
        remedy = f"did you mean {directory / versions[-1]}?" if versions else "give an RLDS version directory"
        raise DatasetError(f"{directory} holds no dataset_info.json; {remedy}")
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:
        raise DatasetError(f"{directory} has unreadable metadata ({error!r}); {_COLLECT_AGAIN}") from None
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise DatasetError(
            f"{directory} is stored as {getattr(file_format, 'value', 'an unknown format')}; "
            "convert it to array_record with `tfds convert_format` (that command needs TensorFlow)"
        )
    if SPLIT not in builder.info.splits:
        raise DatasetError(
            f"{directory} has no split {SPLIT!r}, only {sorted(builder.info.splits)}; {_COLLECT_AGAIN}"
        )
    return builder


def _image_keys(directory: Path, features: Any) -> tuple[str, ...]:
    """Checks that the features the reader relies on are there."""
    steps = features["steps"].feature if "steps" in features else {}
    for key in ("observation", "action", "language_instruction"):
        if key not in steps:
            raise DatasetError(f"{directory} has no step feature {key!r}; it is no RLDS dataset of robot episodes")
    observation = steps["observation"]
    if "state" not in observation:
        raise DatasetError(f"{directory} has no feature observation/state; add proprioception to its steps")
    return tuple(sorted(key for key, f in observation.items() if isinstance(f, tfds.features.Image)))


def _open_shards(directory: Path, split: Any) -> list[_Shard]:
    shards = []
    for file_path, expected in zip(map(Path, split.filepaths), split.shard_lengths, strict=True):
        if not file_path.is_file():
            raise DatasetError(f"shard {file_path} is missing; {_COLLECT_AGAIN}")
        try:
            reader = ArrayRecordReader(str(file_path), _RANDOM_ACCESS)
            records = reader.num_records() if reader.ok() else 0
        except Exception as error:
            raise DatasetError(f"shard {file_path} cannot be opened ({error}); {_COLLECT_AGAIN}") from error
        if records != expected:
            raise DatasetError(
                f"shard {file_path} is truncated or corrupt: {records} of {expected} episodes are readable; "
                f"{_COLLECT_AGAIN}"
            )
        shards.append(_Shard(file_path, reader, records))
    if not shards:
        raise DatasetError(f"{directory} has no episodes; {_COLLECT_AGAIN}")
    return shards


def _episode(example: Mapping[str, Any], image_keys: Sequence[str]) -> EncodedEpisode:
    steps, metadata = example["steps"], example.get("episode_metadata", {})
    instruction = steps["language_instruction"][0].decode()
    return EncodedEpisode(
        task=metadata["task"].decode() if "task" in metadata else instruction,
        family=metadata["family"].decode() if "family" in metadata else "",
        instruction=instruction,
        seed=int(metadata.get("seed", -1)),
        encoded_images={camera_of(key): steps["observation"][key] for key in image_keys},
        state=np.asarray(steps["observation"]["state"], np.float32),
        action=np.asarray(steps["action"], np.float32),
        reasoning=_texts(steps, "reasoning"),
        questions=_texts(steps, "question"),
        answers=_texts(steps, "answer"),
    )


def _texts(steps: Mapping[str, Any], feature: str) -> tuple[str, ...]:
    """One text per step; () where the dataset has no such feature or nothing was recorded."""
    encoded = steps.get(feature, ())
    decoded = {text: text.decode() for text in set(encoded)}  # few differ, and equal ones share their memory
    return tuple(decoded[text] for text in encoded) if any(decoded.values()) else ()
