"""A small dataset with Bridge's name and features and its reasoning: every text and picture tells its step."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

NAME = "bridge_orig"
LENGTHS = (7, 12, 5, 20, 9, 16)
SIZE = 48
#: Episodes of which nothing is written, and (episode, step) that the file leaves out.
SILENT, MISSING_STEP = 4, (1, 3)


def features() -> Any:
    """Of Bridge V2 as RLDS: two cameras, state, an action of 7, and where an episode came from."""
    f = tfds.features
    picture = {"shape": (SIZE, SIZE, 3), "encoding_format": "jpeg"}
    steps = {
        "observation": f.FeaturesDict(
            {
                "image_0": f.Image(**picture),
                "image_1": f.Image(**picture),
                "state": f.Tensor(shape=(7,), dtype=np.float32),
            }
        ),
        "action": f.Tensor(shape=(7,), dtype=np.float32),
        "is_first": f.Scalar(np.bool_),
        "is_last": f.Scalar(np.bool_),
        "language_instruction": f.Text(),
    }
    metadata = {"file_path": f.Text(), "episode_id": f.Scalar(np.int32)}
    return f.FeaturesDict({"steps": f.Dataset(steps), "episode_metadata": f.FeaturesDict(metadata)})


def instruction(episode: int) -> str:
    return f"put the cup {episode} on the plate"


def metadata(episode: int) -> dict[str, Any]:
    return {"file_path": f"/nfs/bridge/{episode % 2}/out.npy", "episode_id": 100 + episode}


def grey(episode: int, step: int, camera: int) -> int:
    """The value of all pixels of a picture."""
    return (37 * episode + 7 * step + 120 * camera) % 256


def state(episode: int, length: int) -> np.ndarray:
    """float32 [T, 7]; differences of neighbours are what Bridge's standard takes as motion."""
    return np.random.default_rng(episode).normal(0, 0.2, (length, 7)).cumsum(0).astype(np.float32)


def record(episode: int, length: int) -> dict[str, Any]:
    states = state(episode, length)
    steps = [
        {
            "observation": {
                **{f"image_{camera}": _jpeg(grey(episode, t, camera)) for camera in (0, 1)},
                "state": states[t],
            },
            "action": np.append(np.zeros(6), t % 6 < 3).astype(np.float32),
            "is_first": t == 0,
            "is_last": t == length - 1,
            "language_instruction": instruction(episode),
        }
        for t in range(length)
    ]
    return {"steps": steps, "episode_metadata": metadata(episode)}


def _jpeg(value: int) -> io.BytesIO:
    return io.BytesIO(cv2.imencode(".jpg", np.full((SIZE, SIZE, 3), value, np.uint8))[1].tobytes())


def write(root: Path, lengths: Sequence[int] = LENGTHS, splits: Sequence[str] = ("train",)) -> Path:
    """`root/bridge_orig/1.0.0`, the same episodes in each split."""
    directory = root / NAME / "1.0.0"
    directory.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="tests"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features(), description="Grey pictures.")
    writer = tfds.core.SequentialWriter(info, 4, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split in splits:
        writer.add_examples({split: [record(episode, length) for episode, length in enumerate(lengths)]})
    writer.close_all()
    return directory


def said(episode: int, step: int) -> dict[str, str]:
    """One step's entry, as the Bridge file has it."""
    at = f"{episode}/{step}"
    return {
        "task": f"Put the cup at {at}. @home",
        "plan": f"1. reach 2. grasp — für {episode}",
        "subtask": f"reach {at}",
        "subtask_reason": "The cup is not held, so: reach.",
        "move": f"move {at}",
        "move_reason": "杯子在左边",
    }


def reasoning(lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """The whole file."""
    whole: dict[str, Any] = {}
    for episode, length in enumerate(lengths):
        entry: dict[str, Any] = {"metadata": {"n_steps": length}, "features": {}}
        if episode != SILENT:
            steps = [step for step in range(length) if (episode, step) != MISSING_STEP]
            entry["reasoning"] = {str(step): said(episode, step) for step in steps}
            entry["features"] = dict(_features(length))
        where = metadata(episode)
        whole.setdefault(where["file_path"], {})[str(where["episode_id"])] = entry
    return whole


def _features(length: int) -> Iterator[tuple[str, Any]]:
    yield "bboxes", [[[0.9, "a cup", [step, 2, 30, 40]], [0.5, "plate", [1, 1, 9, 9]]] for step in range(length)]
    yield "gripper_position", [[step, 2 * step] for step in range(length)]


def write_reasoning(path: Path, lengths: Sequence[int] = LENGTHS) -> Path:
    path.write_text(json.dumps(reasoning(lengths)))
    return path
