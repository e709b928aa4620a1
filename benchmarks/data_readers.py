"""Readers for `benchmarks.data`, in processes of their own, each of which prints one line of JSON.

    python -m benchmarks.data_readers write DIRECTORY EPISODES STEPS SIZE  # an RLDS dataset of JPEG in TFRecord
    python -m benchmarks.data_readers {ipvla,tfds,dlimp} DIRECTORY EPOCHS  # every picture: see `data.summary`
    python -m benchmarks.data_readers lanes DIRECTORY           # resident MB after three epochs of windows
    python -m benchmarks.data_readers lookup DIRECTORY ENTRIES  # median of 20,000 lookups, microseconds

`write`, `tfds` and `dlimp` run wherever TensorFlow is installed, the others with this project's own requirements.
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import psutil  # noqa: E402

#: Far less than the dataset decoded, so that what is cached has to be given up again.
_CACHE_BYTES = 32 << 20
_LOOKUPS = 20_000
#: Of the dataset that is written.
_NAME = "synthetic_robot"
_CAMERAS = ("image", "wrist_image")


def write(root: str, episodes: int, steps: int, size: int) -> None:
    """Episodes of moving waves, their pictures about as large as a camera's of that size."""
    import tensorflow_datasets as tfds

    directory = Path(root) / _NAME / "1.0.0"
    directory.mkdir(parents=True)
    f = tfds.features
    picture = {"shape": (size, size, 3), "encoding_format": "jpeg"}
    step = {
        "observation": f.FeaturesDict(
            {**{c: f.Image(**picture) for c in _CAMERAS}, "state": f.Tensor(shape=(8,), dtype=np.float32)}
        ),
        "action": f.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": f.Text(),
        **{name: f.Scalar(np.bool_) for name in ("is_first", "is_last", "is_terminal")},
        **{name: f.Scalar(np.float32) for name in ("reward", "discount")},
    }
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(_NAME, tfds.core.Version("1.0.0"), str(directory), "benchmarks"),
        features=f.FeaturesDict({"steps": f.Dataset(step)}),
        description="Waves.",
    )
    writer = tfds.core.SequentialWriter(info, max(1, episodes // 4), file_format="tfrecord")
    writer.initialize_splits(["train"])
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    for _ in range(episodes):
        rates = rng.uniform(3, 20, 3)
        texture = rng.normal(0, 6, (size, size, 3))
        rows = []
        for t in range(steps):
            waves = np.stack(
                [np.sin(rates[0] * x + t / 9), np.cos(rates[1] * y - t / 7), np.sin(rates[2] * (x + y))], -1
            )
            pixels = np.clip(128 + 90 * waves + texture, 0, 255).astype(np.uint8)
            rows.append(
                {
                    "observation": {
                        **{c: np.roll(pixels, 3 * i, 1) for i, c in enumerate(_CAMERAS)},
                        "state": rng.normal(size=8).astype(np.float32),
                    },
                    "action": rng.normal(size=7).astype(np.float32),
                    "language_instruction": "follow the wave",
                    **{"is_first": t == 0, "is_last": t == steps - 1, "is_terminal": t == steps - 1},
                    **{"reward": 0.0, "discount": 1.0},
                }
            )
        writer.add_examples({"train": [{"steps": rows}]})
    writer.close_all()


def ipvla_pictures(directory: str) -> Callable[[], Iterator[int]]:
    """Opens a dataset; what is called decodes an epoch of it, and yields pictures by episode."""
    from ipvla.data.rlds import RldsSource

    source = RldsSource(directory)
    cameras = [path for path, feature in source.features.items() if feature.kind == "image"]

    def epoch() -> Iterator[int]:
        for index in range(len(source)):
            trajectory = source.trajectory(index)
            views = [trajectory.pictures(camera) for camera in cameras]
            yield sum(view.decode(t).ndim == 3 for view in views for t in range(len(view)))

    return epoch


def tfds_pictures(directory: str) -> Callable[[], Iterator[int]]:
    """As `as_dataset` gives them: all decoded, step by step."""
    import tensorflow_datasets as tfds

    def epoch() -> Iterator[int]:
        for episode in tfds.builder_from_directory(directory).as_dataset(split="train"):
            steps = tfds.as_numpy(episode["steps"])
            yield sum(step["observation"][camera].ndim == 3 for step in steps for camera in _CAMERAS)

    return epoch


def dlimp_pictures(directory: str) -> Callable[[], Iterator[int]]:
    """Of whole trajectories, decoded in tf.data as OpenVLA does."""
    import dlimp
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def decoded(frame: Any) -> Any:
        for camera in _CAMERAS:
            encoded = frame["observation"][camera]
            frame["observation"][camera] = tf.io.decode_image(encoded, expand_animations=False, dtype=tf.uint8)
        return frame

    def epoch() -> Iterator[int]:
        builder = tfds.builder_from_directory(directory)
        data = dlimp.DLataset.from_rlds(builder, shuffle=False).frame_map(decoded, tf.data.AUTOTUNE)
        for trajectory in data.as_numpy_iterator():
            yield sum(len(trajectory["observation"][camera]) for camera in _CAMERAS)

    return epoch


READERS = {"ipvla": ipvla_pictures, "tfds": tfds_pictures, "dlimp": dlimp_pictures}


def read_pictures(reader: str, directory: str, epochs: int) -> dict[str, Any]:
    """Decodes every picture of an RLDS dataset; a turn as `data.summary` takes it."""
    process, first_s, told = psutil.Process(), 0.0, []
    epoch = READERS[reader](directory)
    for _ in range(epochs):
        cpu, pictures = time.process_time(), 0
        for seen in epoch():
            first_s = first_s or time.perf_counter() - _STARTED
            pictures += seen
        told.append({"pictures": pictures, "cpu_s": time.process_time() - cpu, "rss": process.memory_info().rss})
    return {"first_s": first_s, "epochs": told}


def resident_mb(directory: str) -> list[float]:
    """Of a process that reads windows of whole episodes, after each of three epochs."""
    from ipvla.data.conventions import Conventions
    from ipvla.data.dataset import open_dataset
    from ipvla.data.lanes import LaneConfig
    from ipvla.data.plan import PlanPosition
    from ipvla.data.transforms import PromptEncoder, Transforms

    dataset = open_dataset(directory, _CACHE_BYTES)
    conventions = Conventions(dataset.statistics(), dataset.cameras, image_size=224, chunk=8)
    transforms = Transforms(conventions, PromptEncoder(lambda text: [1], max_prompt_tokens=4))
    lanes = LaneConfig(lanes=4, window=8, stride=4).build(dataset, transforms)
    position, told = PlanPosition(), []
    for epoch in range(3):
        while position.epoch == epoch:
            lanes.batch(position)
            position = lanes.after(position)
        told.append(psutil.Process().memory_info().rss / 1e6)
    return told


def lookup_us(directory: Path, entries: int) -> float:
    """To find an episode at random in a large index that was saved and is mapped from its file."""
    from ipvla.data.rlds.index import EpisodeEntry, EpisodeIndex

    path = directory / "index.npy"
    made = (EpisodeEntry(n // 1000, 5_000_000 * n, 5_000_000, 100, f"task {n % 500}", "") for n in range(entries))
    EpisodeIndex.of(made).save(path)
    index = EpisodeIndex.load(path)
    assert index is not None
    times = []
    for number in np.random.default_rng(0).integers(0, entries, _LOOKUPS).tolist():
        start = time.perf_counter()
        index.place(number)
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


if __name__ == "__main__":
    kind, place, *numbers = sys.argv[1:]
    counts = [*map(int, numbers)]
    if kind == "write":
        write(place, *counts)
    elif kind == "lanes":
        print(json.dumps(resident_mb(place)))
    elif kind == "lookup":
        print(json.dumps(lookup_us(Path(place), *counts)))
    else:
        print(json.dumps(read_pictures(kind, place, *counts)))
