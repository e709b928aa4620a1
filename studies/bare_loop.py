"""What training and acting cost here beside a bare loop on the same weights.

The bare loop is what one would write by hand around an OFT model: embeddings, transformers' language model, head,
L1 loss, backward, clip, AdamW, on batches that lie ready. Ours reads windows of episodes, carries a memory and
keeps its books. Both take every step one after the other in one process, so that a busy machine slows both.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
import torch

from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.models.backbones.prismatic import PrismaticBackbone
from ipvla.models.heads.oft import OFTHead
from ipvla.policy import Policy
from ipvla.training.parallel import World
from ipvla.training.step import training_step
from ipvla.types import ModelInputs, Observation, StepBatch
from ray_jobs.command_line.settings import parse

Loop = Literal["ours", "bare"]


@dataclass(frozen=True)
class Overheads:
    """Ours over the bare loop's: medians of paired steps and answers, and largest memory.

    Attributes:
        train_ms, bare_train_ms, act_ms, bare_act_ms: medians.
        train, act, memory: ratios.
    """

    train_ms: float
    bare_train_ms: float
    act_ms: float
    bare_act_ms: float
    train: float
    act: float
    memory: float


class BareModel:
    """An OFT policy's network, called without anything of this project around it."""

    def __init__(self, policy: Policy) -> None:
        backbone, head = policy.model.backbone, policy.model.head
        assert isinstance(backbone, PrismaticBackbone)
        assert isinstance(head, OFTHead)
        self._backbone, self._head, self._varies = backbone, head, policy.model.action_varies

    def chunks(self, inputs: ModelInputs) -> torch.Tensor:
        """Normalised, float32 [B, C, A]."""
        embedded, (chunk, size) = self._backbone.embed(inputs), self._head.shape
        language = self._backbone.network.language_model.model
        hidden = language(
            inputs_embeds=embedded.tokens, attention_mask=embedded.valid[:, None, None], use_cache=False
        ).last_hidden_state
        places = embedded.last[:, None] + torch.arange(chunk * size)
        states = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        actions: torch.Tensor = self._head.model(states.reshape(len(states), chunk, -1))
        return actions

    def loss(self, window: StepBatch) -> torch.Tensor:
        """L1 over what varies and was recorded."""
        inputs = window.inputs.flatten()
        counted = (window.action_valid & window.valid[..., None]).flatten(0, 1)[..., None] & self._varies
        return (self.chunks(inputs) - window.actions.flatten(0, 1)).abs()[counted].mean()


class Race:
    """Both loops over one experiment; `arguments` are those of `ray_jobs.train`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.config = parse(ExperimentConfig, list(arguments))
        self.experiment: Experiment = self.config.build(World())
        self.experiment.state.model.train()
        self.bare = BareModel(self.experiment.policy)
        self._batches = self.experiment.lanes.batches(self.experiment.state.position)

    def ours(self) -> StepBatch:
        """One step of training, its window included, as `ipvla.training.loop` takes it."""
        _, window = next(self._batches)
        training_step(self.experiment.state, [window], self.config.optimizer.lr, 1.0, None)
        return window

    def by_hand(self, window: StepBatch) -> None:
        """One step on this window."""
        state = self.experiment.state
        state.optimizer.zero_grad(set_to_none=True)
        self.bare.loss(window).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for p in state.model.parameters() if p.requires_grad], 1.0)
        state.optimizer.step()


def measure(arguments: Sequence[str], rounds: int) -> Overheads:
    """Of a policy without a memory, in float32, on one core; `rounds` of each after two that do not count."""
    torch.set_num_threads(1)
    race, train, bare = Race(arguments), list[float](), list[float]()
    for _ in range(rounds + 2):
        began = time.perf_counter()
        window = race.ours()
        between = time.perf_counter()
        race.by_hand(window)
        train.append(between - began)
        bare.append(time.perf_counter() - between)
    act, bare_act = _answers(race, rounds)
    peaks = {loop: _peak_mib(arguments, loop, rounds) for loop in ("ours", "bare")}
    step, by_hand, answer, network = (1000 * median(times[2:]) for times in (train, bare, act, bare_act))
    memory = peaks["ours"] / peaks["bare"]
    return Overheads(step, by_hand, answer, network, step / by_hand, answer / network, memory)


@torch.no_grad()
def _answers(race: Race, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each answer to one observation, pictures and prompt to numbers; and of the network alone."""
    policy = race.experiment.policy
    policy.model.eval()
    size = policy.transforms.conventions.image_size
    seen = Observation(
        images={camera: np.zeros((size, size, 3), np.uint8) for camera in policy.transforms.cameras},
        proprio=np.zeros(policy.transforms.statistics.proprio.dim, np.float32),
        instruction="press the red button",
        t=0,
    )
    inputs, memory = policy.transforms.inputs([seen]), policy.initial_memory(1)
    ours, bare = [], []
    for _ in range(10 * rounds + 2):
        began = time.perf_counter()
        policy.act([seen], memory)
        between = time.perf_counter()
        race.bare.chunks(inputs)
        ours.append(between - began)
        bare.append(time.perf_counter() - between)
    return ours, bare


def _peak_mib(arguments: Sequence[str], loop: Loop, rounds: int) -> float:
    """Largest resident memory of a process that trains by this loop alone."""
    command = [sys.executable, "-m", "studies.bare_loop", loop, str(rounds), *arguments]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return float(lines[-1])


def main(loop: str, rounds: int, arguments: Sequence[str]) -> None:
    """Trains by one loop, and prints the largest resident memory in MiB."""
    torch.set_num_threads(1)
    race = Race(arguments)
    window = race.experiment.lanes.batch(race.experiment.state.position)
    for _ in range(rounds):
        race.ours() if loop == "ours" else race.by_hand(window)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
