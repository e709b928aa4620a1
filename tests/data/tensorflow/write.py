"""Writes the dataset of this directory and what `tfds.as_dataset` gives of it; needs requirements-oxe.txt.

python tests/data/tensorflow/write.py [DIRECTORY]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NAME = "libero_spatial_no_noops"
LENGTHS = (4, 6, 5)
SIZE = 32


def features() -> Any:
    """Of OpenVLA's LIBERO datasets."""
    f = tfds.features
    picture = {"shape": (SIZE, SIZE, 3), "encoding_format": "jpeg"}
    observation = {
        "image": f.Image(**picture),
        "wrist_image": f.Image(**picture),
        "state": f.Tensor(shape=(8,), dtype=np.float32),
        "joint_state": f.Tensor(shape=(7,), dtype=np.float32),
    }
    steps = {
        "observation": f.FeaturesDict(observation),
        "action": f.Tensor(shape=(7,), dtype=np.float32),
        "discount": f.Scalar(np.float32),
        "reward": f.Scalar(np.float32),
        "is_first": f.Scalar(np.bool_),
        "is_last": f.Scalar(np.bool_),
        "is_terminal": f.Scalar(np.bool_),
        "language_instruction": f.Text(),
    }
    return f.FeaturesDict({"steps": f.Dataset(steps), "episode_metadata": f.FeaturesDict({"file_path": f.Text()})})


def picture(rng: np.random.Generator, t: int) -> Any:
    """uint8 [SIZE, SIZE, 3]: waves with noise, so that every coefficient of the JPEG is in use."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    waves = np.stack([np.sin(9 * x + t), np.cos(7 * y - t), np.sin(5 * (x + y) + t)], axis=-1)
    return np.clip(128 + 90 * waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def episode(seed: int, length: int) -> dict[str, Any]:
    """One record."""
    rng = np.random.default_rng(seed)
    steps = [
        {
            "observation": {
                "image": picture(rng, t),
                "wrist_image": picture(rng, t + 1),
                "state": rng.normal(size=8).astype(np.float32),
                "joint_state": rng.normal(size=7).astype(np.float32),
            },
            "action": np.append(rng.normal(0, 0.3, 6), rng.choice([-1, 1])).astype(np.float32),
            "discount": 1.0,
            "reward": float(t == length - 1),
            "is_first": t == 0,
            "is_last": t == length - 1,
            "is_terminal": t == length - 1,
            "language_instruction": f"pick up the bowl number {seed}",
        }
        for t in range(length)
    ]
    return {"steps": steps, "episode_metadata": {"file_path": f"/data/{seed}.hdf5"}}


def write(root: Path) -> Path:
    """The dataset, one shard of two episodes and one of one."""
    directory = root / NAME / "1.0.0"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="tests"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features(), description="Random pictures and numbers.")
    writer = tfds.core.SequentialWriter(info, 2, file_format="tfrecord")
    writer.initialize_splits(["train"])
    for seed, length in enumerate(LENGTHS):
        writer.add_examples({"train": [episode(seed, length)]})
    writer.close_all()
    return directory


def read(directory: Path) -> dict[str, Any]:
    """What TensorFlow gives: pictures of all episodes, one after another, and actions."""
    builder = tfds.builder_from_directory(directory)
    data = builder.as_dataset(split="train", read_config=tfds.ReadConfig(interleave_cycle_length=1))
    steps = [step for record in data for step in tfds.as_numpy(record["steps"])]
    return {
        "image": np.stack([step["observation"]["image"] for step in steps]),
        "wrist_image": np.stack([step["observation"]["wrist_image"] for step in steps]),
        "state": np.stack([step["observation"]["state"] for step in steps]),
        "action": np.stack([step["action"] for step in steps]),
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    np.savez_compressed(target / "expected.npz", **read(write(target)))
