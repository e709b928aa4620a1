"""TensorFlow's side of `benchmarks.data`, a program of its own: it runs wherever TensorFlow is installed.

    PYTHON benchmarks/data_tensorflow.py write DIRECTORY EPISODES STEPS SIZE
    PYTHON benchmarks/data_tensorflow.py {tfds,dlimp} DIRECTORY EPOCHS

`write` makes an RLDS dataset of JPEG pictures in TFRecord. The others read it, decode every picture, and print one
line of JSON, see `benchmarks.data.summary`.
"""

from __future__ import annotations

import json
import sys
import time

_STARTED = time.perf_counter()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

NAME = "synthetic_robot"
CAMERAS = ("image", "wrist_image")


def write(root: str, episodes: int, steps: int, size: int) -> None:
    """Episodes of moving waves, their pictures about as large as a camera's of that size."""
    directory = Path(root) / NAME / "1.0.0"
    directory.mkdir(parents=True)
    f = tfds.features
    picture = {"shape": (size, size, 3), "encoding_format": "jpeg"}
    step = {
        "observation": f.FeaturesDict(
            {**{c: f.Image(**picture) for c in CAMERAS}, "state": f.Tensor(shape=(8,), dtype=np.float32)}
        ),
        "action": f.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": f.Text(),
        **{name: f.Scalar(np.bool_) for name in ("is_first", "is_last", "is_terminal")},
        **{name: f.Scalar(np.float32) for name in ("reward", "discount")},
    }
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(NAME, tfds.core.Version("1.0.0"), str(directory), "benchmarks"),
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
                        **{c: np.roll(pixels, 3 * i, 1) for i, c in enumerate(CAMERAS)},
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


def tfds_pictures(directory: str) -> Iterator[int]:
    """Pictures of each episode, as `as_dataset` gives them: all decoded, step by step."""
    data = tfds.builder_from_directory(directory).as_dataset(split="train")
    for episode in data:
        seen = 0
        for step in tfds.as_numpy(episode["steps"]):
            seen += sum(step["observation"][camera].ndim == 3 for camera in CAMERAS)
        yield seen


def dlimp_pictures(directory: str) -> Iterator[int]:
    """Pictures of each trajectory, decoded in tf.data as OpenVLA does."""
    import dlimp

    def decoded(frame: Any) -> Any:
        for camera in CAMERAS:
            encoded = frame["observation"][camera]
            frame["observation"][camera] = tf.io.decode_image(encoded, expand_animations=False, dtype=tf.uint8)
        return frame

    builder = tfds.builder_from_directory(directory)
    data = dlimp.DLataset.from_rlds(builder, shuffle=False).frame_map(decoded, tf.data.AUTOTUNE)
    for trajectory in data.as_numpy_iterator():
        yield sum(len(trajectory["observation"][camera]) for camera in CAMERAS)


def main() -> None:
    """As the module says."""
    kind, directory, *numbers = sys.argv[1:]
    if kind == "write":
        write(directory, *map(int, numbers))
        return
    read = {"tfds": tfds_pictures, "dlimp": dlimp_pictures}[kind]
    process = psutil.Process()
    first_s, epochs = 0.0, []
    for _ in range(int(numbers[0])):
        cpu, pictures = time.process_time(), 0
        for seen in read(directory):
            first_s = first_s or time.perf_counter() - _STARTED
            pictures += seen
        epochs.append({"pictures": pictures, "cpu_s": time.process_time() - cpu, "rss": process.memory_info().rss})
    print(json.dumps({"first_s": first_s, "epochs": epochs}))


if __name__ == "__main__":
    main()
