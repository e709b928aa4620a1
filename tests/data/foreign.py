"""Datasets as other programs write them: OpenVLA's features of LIBERO through tfds, and LIBERO's own HDF5."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import tensorflow_datasets as tfds

SIZE = 16
JPEG = cv2.imencode(".jpg", np.full((SIZE, SIZE, 3), 128, np.uint8))[1].tobytes()
LENGTHS = (4, 6, 5)


def write_foreign(
    directory: Path,
    *,
    inner_name: str = "foreign",
    action_dim: int = 7,
    action_shape: tuple[int, ...] | None = None,
    split: str = "train",
    joints: bool = True,
    state: str = "state",
    depth: bool = False,
    seed: str | None = None,
    change: Callable[[int, int, dict[str, Any]], None] = lambda episode, t, step: None,
) -> Path:
    """Three episodes of `LENGTHS` steps in one version directory.

    Args:
        inner_name: what the metadata call the dataset.
        joints: steps have `joint_state`, as the published datasets do.
        state: what 8 numbers of the state are called.
        depth: steps have a camera of 16 bits.
        seed: metadata of that name, a text.
        change: called for each episode and step with the step, to damage it.
    """
    f = tfds.features
    shape = (action_dim,) if action_shape is None else action_shape
    image = {"shape": (SIZE, SIZE, 3), "encoding_format": "jpeg"}
    observation = {"image": f.Image(**image), "wrist_image": f.Image(**image)}
    observation |= {state: f.Tensor(shape=(8,), dtype=np.float32)}
    if joints:
        observation["joint_state"] = f.Tensor(shape=(7,), dtype=np.float32)
    if depth:
        observation["depth"] = f.Image(shape=(SIZE, SIZE, 1), dtype=np.uint16, encoding_format="png")
    features = {
        "observation": f.FeaturesDict(observation),
        "action": f.Tensor(shape=shape, dtype=np.float32) if shape else f.Scalar(np.float32),
        "language_instruction": f.Text(),
    }
    metadata = {"file_path": f.Text(), **({"seed": f.Text()} if seed else {})}
    directory.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(inner_name, tfds.core.Version("1.0.0"), str(directory), "tests")
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=f.FeaturesDict({"steps": f.Dataset(features), "episode_metadata": f.FeaturesDict(metadata)}),
    )
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits([split])
    for number, length in enumerate(LENGTHS):
        rng = np.random.default_rng(number)
        steps = []
        for t in range(length):
            action = rng.uniform(-1, 1, shape).astype(np.float32)
            if shape:
                action[..., -1] = rng.choice([-1, 1])
            seen = {"image": JPEG, "wrist_image": JPEG, state: rng.normal(size=8).astype(np.float32)}
            if joints:
                seen["joint_state"] = np.zeros(7, np.float32)
            if depth:
                seen["depth"] = cv2.imencode(".png", np.full((SIZE, SIZE), 1000 + t, np.uint16))[1].tobytes()
            step = {"observation": seen, "action": action, "language_instruction": "open the drawer"}
            change(number, t, step)
            step["observation"] = {
                name: io.BytesIO(value) if isinstance(value, bytes) else value for name, value in seen.items()
            }
            steps.append(step)
        about = {"file_path": f"{number}.hdf5", **({"seed": seed} if seed else {})}
        writer.add_examples({split: [{"steps": steps, "episode_metadata": about}]})
    writer.close_all()
    return directory


def not_a_number(episode: int, t: int, step: dict[str, Any]) -> None:
    """One action of episode 1."""
    if (episode, t) == (1, 3):
        step["action"][0] = np.nan


def no_picture(episode: int, t: int, step: dict[str, Any]) -> None:
    """All of episode 1's, which only looking at them tells."""
    if episode == 1:
        step["observation"]["image"] = b"\xff\xd8 no JPEG"


def other_words(episode: int, t: int, step: dict[str, Any]) -> None:
    """Two instructions in the first two episodes."""
    if episode < 2 and t > 1:
        step["language_instruction"] = "close it again"


def write_hdf5(path: Path, lengths: tuple[int, ...], problem: dict[str, object] | None) -> None:
    """A task's file as LIBERO publishes it: episodes of so many steps, and `problem` as its `problem_info`."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if problem is not None:
            data.attrs["problem_info"] = json.dumps(problem)
        for number, length in enumerate(lengths):
            rng = np.random.default_rng(number)
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["obs/ee_states"] = rng.normal(size=(length, 6))
            demo["obs/gripper_states"] = rng.normal(size=(length, 2))
            demo["obs/joint_states"] = rng.normal(size=(length, 7))
            for name in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{name}"] = rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8)
