"""Datasets made by hand: LIBERO's layout with given actions, states, words and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evaluators.dataset_card import DatasetCard, dataset_card
from evaluators.dataset_sample import take_sample
from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.source import BrokenEpisodeError, Feature, Trajectory
from ipvla.data.standards import Standard
from ipvla.data.survey import surveyed

FEATURES = {
    "observation/image": Feature("image", (0, 0, 3), "uint8"),
    "observation/wrist_image": Feature("image", (0, 0, 3), "uint8"),
    "observation/state": Feature("number", (8,)),
    "action": Feature("number", (7,)),
    "language_instruction": Feature("text", (), "str"),
}


@dataclass(frozen=True)
class MadeEpisode:
    """One recorded episode; `size` is its pictures' height and width."""

    action: np.ndarray
    state: np.ndarray
    instruction: str = "open the drawer"
    size: tuple[int, int] = (8, 8)
    reasoning: tuple[str, ...] = ()
    broken: bool = False
    picture: bytes | None = None


@dataclass(frozen=True)
class MadeSource:
    """Their source."""

    episodes: Sequence[MadeEpisode]
    name: str = "made"
    location: str = "memory"
    features: Mapping[str, Feature] = field(default_factory=lambda: FEATURES)

    inner_name: str = "made"
    format: str = "RLDS"
    fps: float | None = None
    broken: Sequence[str] = ()

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(episode.action) for episode in self.episodes])

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(episode.instruction for episode in self.episodes)

    @property
    def families(self) -> tuple[str, ...]:
        return ("",) * len(self.episodes)

    def trajectory(self, index: int) -> Trajectory:
        episode = self.episodes[index]
        if episode.broken:
            raise BrokenEpisodeError(f"episode {index} is corrupt")
        length = len(episode.action)
        picture = episode.picture or encode_png(np.full((*episode.size, 3), 90, np.uint8))
        pictures = EncodedPictures((picture,) * length)
        steps = {
            "observation/image": pictures,
            "observation/wrist_image": pictures,
            "observation/state": episode.state,
            "action": episode.action,
            "language_instruction": (episode.instruction,) * length,
            "reasoning": episode.reasoning,
        }
        return Trajectory(steps, f"episode {index}")


def good_episode(seed: int, length: int = 1000) -> MadeEpisode:
    """Moves at every step; the gripper is open, closes, opens, and its fingers follow."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    closed = (np.arange(length) * 4 // length) % 2 == 1
    action[:, 6] = np.where(closed, 1, -1)
    state = rng.normal(size=(length, 8)).astype(np.float32)
    state[:, 6] = np.where(closed, 0.002, 0.04)
    state[:, 7] = -state[:, 6]
    return MadeEpisode(action, state)


def good_episodes() -> list[MadeEpisode]:
    return [good_episode(seed) for seed in range(6)]


def with_gripper(episode: MadeEpisode, gripper: np.ndarray | float) -> MadeEpisode:
    action = episode.action.copy()
    action[:, 6] = gripper
    return replace(episode, action=action)


def card_of(source: MadeSource, standard: Standard, sample: int = 100) -> DatasetCard:
    survey = surveyed(source, standard, None)
    return dataset_card(source, standard, survey, take_sample(source, standard, survey, sample))
