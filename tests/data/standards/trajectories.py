"""Trajectories with the names, shapes and types that the public datasets' features have; numbers are random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ipvla.data.pictures import EncodedPictures
from ipvla.data.source import Feature, Steps, Trajectory

Make = Callable[[int, int], Trajectory]


def pictures(length: int, name: str = "") -> EncodedPictures:
    return EncodedPictures(tuple(f"{name}{t}".encode() for t in range(length)))


def trajectory(steps: Mapping[str, Steps], **metadata: Any) -> Trajectory:
    return Trajectory(steps, "a dataset made by hand, episode 0", metadata)


def features(made: Trajectory) -> dict[str, Feature]:
    """What a source would say of it."""
    kinds: dict[str, Feature] = {}
    for path, values in made.steps.items():
        if isinstance(values, np.ndarray):
            kinds[path] = Feature("number", values.shape[1:], values.dtype.name)
        elif isinstance(values, tuple):
            kinds[path] = Feature("text", (), "str")
        else:
            kinds[path] = Feature("image", (0, 0, 3), "uint8")
    return kinds


def libero(length: int, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    action = rng.normal(size=(length, 7)).astype(np.float32)
    action[:, 6] = rng.choice([-1, 1], length)
    return trajectory(
        {
            "observation/image": pictures(length, "image"),
            "observation/wrist_image": pictures(length, "wrist"),
            "observation/state": rng.normal(size=(length, 8)).astype(np.float32),
            "observation/joint_state": rng.normal(size=(length, 7)).astype(np.float32),
            "action": action,
            "language_instruction": ("pick up the bowl",) * length,
            "discount": np.ones(length, np.float32),
            "reward": np.zeros(length, np.float32),
            "is_first": np.arange(length) == 0,
            "is_last": np.arange(length) == length - 1,
            "is_terminal": np.arange(length) == length - 1,
        },
        file_path="pick_up_the_bowl_demo.hdf5",
    )


def bridge(length: int, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    action = rng.normal(scale=0.02, size=(length, 7)).astype(np.float32)
    action[:, 6] = rng.choice([0.0, 0.04, 0.3, 0.6, 0.94, 0.96, 1.0], length)
    action[0] = 0
    return trajectory(
        {
            **{f"observation/image_{view}": pictures(length, f"{view}:") for view in range(4)},
            "observation/state": rng.normal(size=(length, 7)).astype(np.float32),
            "action": action,
            "language_instruction": ("put the carrot on the plate",) * length,
            "language_embedding": rng.normal(size=(length, 512)).astype(np.float32),
            "discount": np.ones(length, np.float32),
            "is_first": np.arange(length) == 0,
        },
        episode_id=np.int32(seed),
        file_path="/nfs/kun2/users/homer/datasets/bridge_data_all/numpy_256/x/out.npy",
        has_language=True,
    )


def fractal(length: int, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    return trajectory(
        {
            "observation/image": pictures(length, "image"),
            "observation/natural_language_instruction": ("pick coke can",) * length,
            "observation/natural_language_embedding": rng.normal(size=(length, 512)).astype(np.float32),
            "observation/base_pose_tool_reached": rng.normal(size=(length, 7)).astype(np.float32),
            "observation/gripper_closed": rng.uniform(size=(length, 1)).astype(np.float32),
            "action/world_vector": rng.normal(size=(length, 3)).astype(np.float32),
            "action/rotation_delta": rng.normal(size=(length, 3)).astype(np.float32),
            "action/gripper_closedness_action": rng.choice(
                np.array([-1, -0.1, 0, 0.05, 0.1, 1], np.float32), (length, 1), p=[0.1, 0.2, 0.3, 0.2, 0.1, 0.1]
            ),
            "action/terminate_episode": np.zeros((length, 3), np.int32),
            "action/base_displacement_vector": np.zeros((length, 2), np.float32),
            "reward": np.zeros(length, np.float32),
        }
    )


def droid(length: int, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    return trajectory(
        {
            "observation/exterior_image_1_left": pictures(length, "1:"),
            "observation/exterior_image_2_left": pictures(length, "2:"),
            "observation/wrist_image_left": pictures(length, "wrist"),
            "observation/cartesian_position": rng.normal(size=(length, 6)),
            "observation/gripper_position": rng.uniform(size=(length, 1)),
            "observation/joint_position": rng.normal(size=(length, 7)),
            "action_dict/cartesian_velocity": rng.normal(size=(length, 6)),
            "action_dict/cartesian_position": rng.normal(size=(length, 6)),
            "action_dict/gripper_position": rng.uniform(size=(length, 1)),
            "action_dict/joint_velocity": rng.normal(size=(length, 7)),
            "action": rng.normal(size=(length, 7)),
            "language_instruction": ("move the pen",) * length,
            "language_instruction_2": ("",) * length,
        },
        file_path="/home/x/trajectory.h5",
        recording_folderpath="/home/x/recordings/MP4",
    )


def recorded(length: int, seed: int = 0) -> Trajectory:
    """As `write_rlds` writes them."""
    rng = np.random.default_rng(seed)
    action = rng.normal(size=(length, 7)).astype(np.float32)
    action[:, 6] = rng.choice([-1, 1], length)
    return trajectory(
        {
            "observation/image": pictures(length, "image"),
            "observation/overhead": pictures(length, "overhead"),
            "observation/state": rng.normal(size=(length, 8)).astype(np.float32),
            "action": action,
            "language_instruction": ("press the red button",) * length,
            "reasoning": tuple(f"PLAN: {t}" for t in range(length)),
            "question": tuple(f"where is {t}?" for t in range(length)),
            "answer": tuple(f"at {t}" for t in range(length)),
        },
        task="press",
        family="recall",
        seed=np.int64(7),
        file_path="press/7",
    )


@dataclass(frozen=True)
class MemorySource:
    """An `EpisodeSource` of trajectories that are there already."""

    name: str
    trajectories: tuple[Trajectory, ...]
    location: str = "memory"

    @property
    def features(self) -> Mapping[str, Feature]:
        return features(self.trajectories[0])

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(made) for made in self.trajectories], np.int64)

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("",) * len(self.trajectories)

    @property
    def families(self) -> tuple[str, ...]:
        return self.tasks

    def trajectory(self, index: int) -> Trajectory:
        return self.trajectories[index]
