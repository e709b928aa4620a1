"""Training batches: every lane's next window of whole episodes in order, a pure function of the position."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch

from ipvla.data.augmentation import AugmentationConfig
from ipvla.data.mixture_dataset import Dataset
from ipvla.data.plan import EpochPlan, IntArray, Layout, PlanPosition, WindowPlan
from ipvla.data.source import BrokenEpisodeError, DatasetError
from ipvla.data.transforms import Transforms
from ipvla.types import NO_TOKEN, ModelInputs, Observation, StepBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LaneConfig:
    """How episodes are laid onto lanes.

    Attributes:
        lanes: B, episodes that one worker trains on side by side.
        window: K, policy steps per training step; gradients reach back this far.
        stride: control steps per policy step, as many as rollout executes of each chunk.
        offsets: the first control step of an episode is drawn from so many, at most `stride`; None for `stride`.
            Rollouts begin at 0: give fewer where what is shown at the start would be gone.
        seed: of the order of episodes and their offsets.
    """

    lanes: int = 16
    window: int = 8
    stride: int = 4
    offsets: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lanes", "window", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to at least 1")
        if self.offsets is not None and not 1 <= self.offsets <= self.stride:
            raise ValueError(f"offsets is {self.offsets}; set it to 1..{self.stride}, the stride")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; set it to 0 or more")

    def build(
        self,
        dataset: Dataset,
        transforms: Transforms,
        rank: int = 0,
        world_size: int = 1,
        augmentation: AugmentationConfig | None = None,
    ) -> LaneReader:
        """The lanes of worker `rank` of `world_size`.

        Raises:
            DatasetError: the dataset's pictures were drawn at other steps than the stride samples.
        """
        if self.stride % dataset.pictures_every:
            raise DatasetError(
                f"lanes.stride is {self.stride}, and {dataset.location} has a new picture every "
                f"{dataset.pictures_every} control steps; set it to a multiple of that"
            )
        return LaneReader(dataset, transforms, self, rank, world_size, augmentation)


class LaneReader:
    """One worker's lanes. `batch(position)` depends on nothing but its argument and the constructor's.

    Attributes:
        broken: episodes of which a step could not be read and was left idle.
    """

    def __init__(
        self,
        dataset: Dataset,
        transforms: Transforms,
        config: LaneConfig,
        rank: int = 0,
        world_size: int = 1,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside the {world_size} workers; use 0..{world_size - 1}")
        self._dataset = dataset
        self._transforms = transforms
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._augmentation = augmentation
        self.broken: set[int] = set()
        self._transforms_of = cache(transforms.of)
        self._plan: tuple[tuple[int, tuple[Layout, ...]], EpochPlan] | None = None

    @property
    def lanes_total(self) -> int:
        """Of all workers."""
        return self._config.lanes * self._world_size

    def plan(self, position: PlanPosition) -> EpochPlan:
        """The plan of all workers' lanes that the position is in."""
        cached, key = self._plan, (position.epoch, position.before)
        if cached is None or cached[0] != key:
            c = self._config
            plan = EpochPlan(
                self._dataset.lengths,
                c.seed,
                position.epoch,
                lanes_total=self.lanes_total,
                window=c.window,
                stride=c.stride,
                offsets=c.offsets,
                before=position.before,
                repeats=self._dataset.repeats(c.seed, position.epoch),
                grid=self._dataset.pictures_every,
            )
            self._plan = cached = (key, plan)
        return cached[1]

    def after(self, position: PlanPosition) -> PlanPosition:
        """The position that follows: what a checkpoint taken after training on `position` stores."""
        return position.next(self.plan(position).num_windows)

    def readings(self, position: PlanPosition) -> dict[str, float]:
        """For the log: the epoch, the share of places in lanes without an episode, episodes that are broken."""
        readings = {"train/epoch": position.epoch, "data/idle_share": self.plan(position).idle_share}
        broken = self._dataset.broken + len(self.broken)
        return {**readings, "data/broken_episodes": broken} if self._dataset.skips_bad_episodes else readings

    def batch(self, position: PlanPosition) -> StepBatch:
        """The window at `position`: leading axes [B, K]. DatasetError if an episode turns out corrupt."""
        first = self._rank * self._config.lanes
        window = self.plan(position).window(position.window).lanes(first, first + self._config.lanes)
        return self._read(window, position.epoch)

    def batches(self, start: PlanPosition) -> Generator[tuple[PlanPosition, StepBatch], None, None]:
        """From `start` on without end, prefetched in a background thread; close the generator to stop it."""
        return prefetch(self._endless(start))

    def _endless(self, position: PlanPosition) -> Iterator[tuple[PlanPosition, StepBatch]]:
        while True:
            yield position, self.batch(position)
            position = self.after(position)

    def _read(self, window: WindowPlan, epoch: int) -> StepBatch:
        lanes, steps = window.episode.shape
        if self._dataset.skips_bad_episodes:
            window = self._readable(window)
        valid = window.episode >= 0
        places = zip(window.episode.ravel().tolist(), window.t.ravel().tolist(), strict=True)
        observations = [self._stand_in if episode < 0 else self._observation(episode, t) for episode, t in places]
        inputs = self._inputs(observations, window.episode.ravel().tolist())
        if self._augmentation is not None:
            pictures, episodes = inputs.images.numpy(), window.episode.ravel()
            varied = self._augmentation.batch(pictures, episodes, self._config.seed, epoch)
            inputs = replace(inputs, images=torch.from_numpy(varied))
        actions = np.zeros((lanes, steps, self._transforms.chunk, self._transforms.action_dim), np.float32)
        action_valid = np.zeros(actions.shape[:3], np.bool_)
        for lane in range(lanes):
            for episode in np.unique(window.episode[lane, valid[lane]]).tolist():
                places = window.episode[lane] == episode
                recorded = self._dataset.episode(episode)
                transforms = self._transforms_of(self._dataset.part(episode))
                targets = transforms.chunk_targets(recorded.action, window.t[lane, places], recorded.state)
                actions[lane, places], action_valid[lane, places] = targets
        return StepBatch(
            inputs=inputs.map(lambda x: x.reshape(lanes, steps, *x.shape[1:])),
            actions=torch.from_numpy(actions),
            action_valid=torch.from_numpy(action_valid),
            is_first=torch.from_numpy(window.is_first),
            valid=torch.from_numpy(valid | window.is_first),
            t=torch.from_numpy(window.t),
            episode_key=torch.from_numpy(window.episode),
            noise_seed=torch.from_numpy(mixed(self._config.seed, epoch, window.episode, window.t)),
            **self._words(window),
        )

    def _inputs(self, observations: Sequence[Observation], episodes: Sequence[int]) -> ModelInputs:
        """In the order of the places, each normalised as its dataset is; idle ones as the first dataset."""
        parts = [self._dataset.part(max(episode, 0)) for episode in episodes]
        if len(set(parts)) == 1:
            return self._transforms_of(parts[0]).inputs(observations)
        order = sorted(range(len(parts)), key=parts.__getitem__)
        made = [
            self._transforms_of(part).inputs([observations[place] for place in places])
            for part, places in groupby(order, key=parts.__getitem__)
        ]
        back = torch.from_numpy(np.argsort(order))
        names = [field.name for field in fields(ModelInputs) if getattr(made[0], field.name) is not None]
        return ModelInputs(**{name: torch.cat([getattr(part, name) for part in made])[back] for name in names})

    def _observation(self, episode: int, t: int) -> Observation:
        return self._dataset.observation(episode, t, self._transforms.cameras, self._transforms.points)

    @cached_property
    def _stand_in(self) -> Observation:
        """What idle places show: well-formed inputs, masked by `valid`."""
        for episode in range(len(self._dataset)):
            with suppress(BrokenEpisodeError):
                return self._observation(episode, 0)
        raise DatasetError(f"{self._dataset.location}: no episode can be read; copy or collect it again")

    def _readable(self, window: WindowPlan) -> WindowPlan:
        """The window without steps that cannot be read; each episode with some is logged and counted once.

        They are idle, but for an episode's first step: that stays valid, without targets, so that memory is reset.
        """
        readable = window.episode >= 0
        for place in zip(*np.nonzero(readable), strict=True):
            episode, t = int(window.episode[place]), int(window.t[place])
            try:
                self._observation(episode, t)
            except BrokenEpisodeError as error:
                readable[place] = False
                if episode not in self.broken:
                    self.broken.add(episode)
                    logger.warning("step %d and perhaps others are left out: %s", t, error)
        return WindowPlan(np.where(readable, window.episode, -1), window.t, window.is_first)

    def _words(self, window: WindowPlan) -> dict[str, torch.Tensor]:
        """Of `StepBatch`: plans at the window's steps and one policy step before, questions and their answers."""
        prompts, shape = self._transforms.prompts, window.episode.shape
        plan, last_plan, question, answer = (
            np.full((*shape, tokens), NO_TOKEN, np.int64)
            for tokens in (
                prompts.plan_tokens,
                prompts.plan_tokens,
                prompts.question_tokens,
                prompts.answer_tokens,
            )
        )
        places = zip(*np.nonzero(window.episode >= 0), strict=True)
        for place in places if prompts.plan_tokens or prompts.question_tokens else ():
            episode, t = self._dataset.episode(int(window.episode[place])), int(window.t[place])
            if prompts.plan_tokens and episode.reasoning:
                plan[place] = prompts.plan(episode.reasoning[t])
                if not window.is_first[place]:
                    last_plan[place] = prompts.plan(episode.reasoning[t - self._config.stride])
            if prompts.question_tokens and episode.questions:
                question[place] = prompts.question(episode.questions[t])
                answer[place] = prompts.answer(episode.answers[t])
        words = {"plan": plan, "last_plan": last_plan, "question": question, "answer": answer}
        return {name: torch.from_numpy(tokens) for name, tokens in words.items()}


def mixed(*values: int | IntArray) -> IntArray:
    """int64 in [0, 2^63), [...]: a hash of integers that are broadcast, every bit of which depends on all of them.

    SplitMix64's finaliser (Steele et al., OOPSLA 2014), once for each value.
    """
    state = np.zeros(np.broadcast_shapes(*(np.shape(value) for value in values)), np.uint64)
    for value in values:
        state = (state ^ np.asarray(value, np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(1)).astype(np.int64)


T = TypeVar("T")

_END = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yields `items` in order while a thread works ahead: `depth` are ready, and one more is in the making.

    An exception of `items` is raised here, in its place. Closing or dropping the generator ends the thread.
    """
    source = iter(items)
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = deque(pool.submit(next, source, _END) for _ in range(depth + 1))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(pool.submit(next, source, _END))
            yield item  # type: ignore[misc]  # an item of T: the end mark has been looked for
    finally:
        pool.shutdown(cancel_futures=True)
