"""Standardised episodes as trajectories of a LeRobotDataset: what a standard made of a dataset can be kept so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ipvla.data.episode import EncodedEpisode
from ipvla.data.lerobot.encoder import VideoSettings
from ipvla.data.lerobot.format import TASK
from ipvla.data.lerobot.layout import Layout
from ipvla.data.pictures import EncodedPictures, Pictures
from ipvla.data.source import Feature, Steps, Trajectory

_CAMERA = "observation.images."
_RECORDED = {"reasoning": "reasoning", "question": "questions", "answer": "answers"}


@dataclass(frozen=True)
class ChosenPictures:
    """Some pictures of an episode, in an order of their own: `steps`, int64 [T], tells which."""

    pictures: Pictures
    steps: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def nbytes(self) -> int:
        return self.pictures.nbytes

    def decode(self, t: int) -> npt.NDArray[np.uint8]:
        return self.pictures.decode(int(self.steps[t]))


def standardised_trajectory(episode: EncodedEpisode) -> Trajectory:
    """The episode's steps as LeRobot names them; pictures that are files stay so.

    They are `observation.images.CAMERA`, `observation.state`, `action`, `task`, and the texts that it has.
    """
    steps: dict[str, Steps] = {
        _CAMERA + name: _chosen(each, episode.raw_step) for name, each in episode.pictures.items()
    }
    steps |= {"observation.state": episode.state, "action": episode.action}
    for feature, attribute in _RECORDED.items():
        if texts := getattr(episode, attribute):
            steps[feature] = texts
    steps[TASK] = (episode.instruction,) * len(episode)
    metadata = {"task": episode.task, "family": episode.family, "seed": episode.seed}
    return Trajectory(steps, f"episode of task {episode.task!r}, seed {episode.seed}", metadata)


def standardised_layout(
    first: EncodedEpisode, fps: int, video: VideoSettings | None = None, robot_type: str | None = None
) -> Layout:
    """For episodes that have what the first one has. ValueError if its pictures cannot be decoded."""
    features: dict[str, Feature] = {}
    for name, values in standardised_trajectory(first).steps.items():
        if isinstance(values, np.ndarray):
            features[name] = Feature("number", values.shape[1:], values.dtype.name)
        elif not isinstance(values, tuple):
            features[name] = Feature("image", values.decode(0).shape, "uint8")
        elif name != TASK:
            features[name] = Feature("text", (), "str")
    return Layout(fps, features, video, robot_type)


def _chosen(pictures: Pictures, steps: npt.NDArray[np.int64]) -> Pictures:
    if isinstance(pictures, EncodedPictures):
        return EncodedPictures(tuple(pictures.encoded[step] for step in steps))
    return ChosenPictures(pictures, steps)
