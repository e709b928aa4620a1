"""Open loop: what a policy would do at recorded observations, beside what was done there.

The policy sees an episode as it was recorded, in order and with its memory, whatever it answers. So this finds
actions in wrong units, of the wrong camera or of an arm that was left out, before a robot moves. It says little
about success: errors that a robot would have to correct never arise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.contract import ContractError, fitted, to_environment
from ipvla.data.dataset import EpisodeDataset
from ipvla.policy import Policy

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EpisodeTrack:
    """One episode's actions, in the data's units with the gripper as the simulator has it.

    Attributes:
        recorded: float32 [T, A].
        played: float32 [T, A]: of each chunk the actions that would be played.
        ahead: float32 [T, A]: as many behind them in the chunk, at the steps they are for; NaN where it has none.
    """

    recorded: npt.NDArray[np.float32]
    played: npt.NDArray[np.float32]
    ahead: npt.NDArray[np.float32]


@dataclass(frozen=True)
class OpenLoop:
    """Of each of A numbers of an action, over all control steps.

    Attributes:
        played, ahead: mean absolute errors, see `EpisodeTrack`; NaN where nothing is ahead.
        held: of repeating, for as long as a chunk is played, the action before it: what a policy should beat.
        spread: mean absolute deviation of the recorded actions from their mean.
        correlation: of played with recorded actions; NaN for a number that never changes.
    """

    played: FloatArray
    ahead: FloatArray
    held: FloatArray
    spread: FloatArray
    correlation: FloatArray

    @property
    def no_better(self) -> tuple[int, ...]:
        """Numbers that vary, and of which both the action before and their mean are nearer than the policy."""
        useless = (self.played >= self.held) & (self.played >= self.spread) & (self.spread > 0)
        return tuple(int(i) for i in np.nonzero(useless)[0])

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, None for NaN."""
        return {
            name: [None if np.isnan(x) else float(x) for x in getattr(self, name)]
            for name in ("played", "ahead", "held", "spread", "correlation")
        }


def require_fit(policy: Policy, dataset: EpisodeDataset) -> None:
    """ContractError if the policy reads or gives something else than the dataset holds."""
    offered = dataset.contract.in_environment_units
    view = fitted(policy.contract, offered, "the policy", f"dataset {dataset.name}")
    for name in ("pictures", "state"):
        if getattr(view, name) != getattr(offered, name) and (name != "state" or view.state != "none"):
            raise ContractError(
                f"the policy reads {name} {getattr(view, name)}, dataset {dataset.name} holds "
                f"{getattr(offered, name)}; give the dataset that it was trained on, or one recorded alike"
            )


def track(policy: Policy, dataset: EpisodeDataset, index: int) -> EpisodeTrack:
    """The policy on one episode of the dataset; the memory is empty at its start.

    Raises:
        BrokenEpisodeError: it cannot be read.
    """
    episode, every = dataset.episode(index), policy.execute
    recorded = to_environment(episode.action, dataset.contract.gripper).astype(np.float32)
    played, ahead = np.full_like(recorded, np.nan), np.full_like(recorded, np.nan)
    memory = policy.initial_memory(1)
    cameras, points = policy.transforms.cameras, policy.transforms.points
    for t in range(0, len(recorded), every):
        chunks, memory = policy.act([dataset.observation(index, t, cameras, points)], memory)
        chunk = chunks[0][: min(2 * every, len(recorded) - t)]
        played[t : t + every] = chunk[:every]
        ahead[t + every : t + len(chunk)] = chunk[every:]
    return EpisodeTrack(recorded, played, ahead)


def measure(tracks: Sequence[EpisodeTrack], execute: int) -> OpenLoop:
    """Over all of these episodes, of a policy that plays `execute` actions of a chunk."""
    recorded, played, ahead = (
        np.concatenate([getattr(one, name) for one in tracks]).astype(np.float64)
        for name in ("recorded", "played", "ahead")
    )
    held = np.concatenate([_held(one.recorded, execute) for one in tracks])
    behind = ~np.isnan(ahead).any(1)
    nothing = np.full(recorded.shape[1], np.nan)
    return OpenLoop(
        played=np.abs(played - recorded).mean(0),
        ahead=np.abs(ahead - recorded)[behind].mean(0) if behind.any() else nothing,
        held=np.abs(held - recorded).mean(0),
        spread=np.abs(recorded - recorded.mean(0)).mean(0),
        correlation=_correlation(played, recorded),
    )


def open_loop(
    policy: Policy, dataset: EpisodeDataset, episodes: Sequence[int], on_episode: Callable[[], None] = lambda: None
) -> tuple[OpenLoop, list[EpisodeTrack]]:
    """The figures, and each episode's track.

    Raises:
        ContractError: the policy does not fit the dataset.
        BrokenEpisodeError: an episode cannot be read.
    """
    require_fit(policy, dataset)
    tracks = []
    for index in episodes:
        tracks.append(track(policy, dataset, index))
        on_episode()
    return measure(tracks, policy.execute), tracks


def _held(recorded: npt.NDArray[np.float32], every: int) -> FloatArray:
    """The action before each chunk, for as long as it is played; at the start the first one."""
    before = np.maximum(np.arange(len(recorded)) // every * every - 1, 0)
    held: FloatArray = recorded[before].astype(np.float64)
    return held


def _correlation(a: FloatArray, b: FloatArray) -> FloatArray:
    a, b = a - a.mean(0), b - b.mean(0)
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    correlation: FloatArray = np.divide((a * b).sum(0), scale, out=np.full(len(scale), np.nan), where=scale > 0)
    return correlation
