"""What a trained memory costs in use: time per act at batch 1 and 8, growth with the episode's length, sizes.

Time is this process's wall time in `Policy.act`, pictures to actions, on one thread and recorded observations in
the order of their episodes. Steps are policy steps, of `execute` control steps each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ipvla.data.dataset import EpisodeDataset
from ipvla.files import write_text
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ipvla.types import Memory, Observation


@dataclass(frozen=True)
class CostConfig:
    """How the costs are measured.

    Attributes:
        early, late: policy steps; the costs of `around` steps from each are compared, on the same pictures.
        around: steps that a median is taken over.
        batch: episodes acted for at once.
        steps: policy steps of those episodes.
        repeats: of every measurement, those that are compared in turns.
    """

    early: int = 10
    late: int = 1000
    around: int = 8
    batch: int = 8
    steps: int = 12
    repeats: int = 9


@dataclass(frozen=True)
class Costs:
    """What one policy costs.

    Attributes:
        parameters, memory_parameters: of the whole model, and of its memory alone.
        state_bytes: what an episode's memory takes, whatever the episode's length.
        act_ms_batch1, act_ms_batch8: medians; the second is for all episodes of a batch together.
        act_ms_early, act_ms_late: medians at batch 1 around the early and the late policy step.
        batch8_speedup: time of single acts over that of the batch, both summed over the same steps.
    """

    parameters: int
    memory_parameters: int
    state_bytes: int
    act_ms_batch1: float
    act_ms_batch8: float
    act_ms_early: float
    act_ms_late: float
    batch8_speedup: float

    @property
    def growth(self) -> float:
        return self.act_ms_late / self.act_ms_early


def costs(policy_directory: Path, dataset: EpisodeDataset, config: CostConfig, record: Path) -> Costs:
    """Measures, or reads what `record` has of the same policy and settings."""
    measured_on = {"policy_sha256": PolicySource(Policy.load, policy_directory).sha256(), **asdict(config)}
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    if known.get("measured_on") == measured_on:
        return Costs(**known["costs"])
    measured = measure(Policy.load(policy_directory), dataset, config)
    write_text(record, json.dumps({"measured_on": measured_on, "costs": asdict(measured)}, indent=1))
    return measured


def measure(policy: Policy, dataset: EpisodeDataset, config: CostConfig) -> Costs:
    """See `Costs`."""
    chosen = np.linspace(0, len(dataset) - 1, config.batch).astype(int).tolist()
    cameras, points = policy.transforms.cameras, policy.transforms.points
    episodes = [
        [
            dataset.observation(index, t, cameras, points)
            for t in range(0, int(dataset.lengths[index]), policy.execute)
        ]
        for index in chosen
    ]
    with _one_thread(), torch.inference_mode():
        early, late = _growth(policy, max(episodes, key=len), config)
        single, batched, speedup = _batching(policy, episodes, config)
    model, memory = (
        sum(weight.numel() for weight in part.parameters()) for part in (policy.model, policy.model.memory)
    )
    state = sum(value.numel() * value.element_size() for value in policy.initial_memory(1).values())
    return Costs(model, memory, state, 1e3 * single, 1e3 * batched, 1e3 * early, 1e3 * late, speedup)


def _growth(policy: Policy, episode: Sequence[Observation], config: CostConfig) -> tuple[float, float]:
    """Seconds per act around the early and the late policy step, medians.

    The episode is seen again and again while its clock runs on. Late steps lie whole rounds behind the early ones,
    so that both see the same pictures; the acts are repeated in turns from saved memories.
    """
    early = range(config.early, config.early + config.around)
    later = -(-(config.late - config.early) // len(episode)) * len(episode)
    kept: dict[int, Memory] = {}
    memory = policy.initial_memory(1)
    for step in range(later + early.stop):
        if step in early or step - later in early:
            kept[step] = memory
        _, memory = policy.act([_at(episode, step, policy)], memory)
    times: dict[int, list[float]] = {0: [], later: []}
    for _ in range(config.repeats):
        for step in early:
            for shift, seconds in times.items():
                seconds.append(_act_s(policy, [_at(episode, step + shift, policy)], kept[step + shift]))
    return median(times[0]), median(times[later])


def _batching(
    policy: Policy, episodes: Sequence[Sequence[Observation]], config: CostConfig
) -> tuple[float, float, float]:
    """Seconds of a single act and of one for all episodes (medians), and by how much the latter is faster."""
    single: list[float] = []
    batched: list[float] = []
    one_by_one_s = together_s = 0.0
    memory = policy.initial_memory(len(episodes))
    for step in range(config.steps):
        observations = [_at(episode, step, policy) for episode in episodes]
        rows = [{name: value[i : i + 1].clone() for name, value in memory.items()} for i in range(len(episodes))]
        sums, togethers = [], []
        for _ in range(config.repeats):
            acts = [_act_s(policy, [seen], row) for seen, row in zip(observations, rows, strict=True)]
            single += acts
            sums.append(sum(acts))
            togethers.append(_act_s(policy, observations, memory))
        batched += togethers
        one_by_one_s += median(sums)
        together_s += median(togethers)
        _, memory = policy.act(observations, memory)
    return median(single), median(batched), one_by_one_s / together_s


def _at(episode: Sequence[Observation], step: int, policy: Policy) -> Observation:
    return replace(episode[step % len(episode)], t=step * policy.execute)


def _act_s(policy: Policy, observations: Sequence[Observation], memory: Memory) -> float:
    started = time.perf_counter()
    policy.act(observations, memory)
    return time.perf_counter() - started


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
