"""The training loop: windows of whole episodes in order, with the memory carried from one to the next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from ipvla.data.lanes import LaneReader
from ipvla.tracking import MetricSink
from ipvla.training.parallel import SHARDINGS, World
from ipvla.training.precision import PRECISIONS, autocast_format
from ipvla.training.step import OptimizerConfig, TrainingState, training_step


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how exactly to train.

    Attributes:
        steps: optimizer steps in all.
        until: the step to stop at for now, with a checkpoint to go on from; the learning rate's course stays that
            of `steps`. None for all of them.
        precision: "bf16" or "fp16" (autocast), "fp32", or "auto": bf16 where that is faster, else fp32.
        log_every, checkpoint_every: in steps.
        checkpoints_kept: the newest ones, each with its policy.
        threads: CPU threads of a worker's arithmetic.
        accumulate: windows per optimizer step, one after another in every lane. Gradients are those of the mean
            of their losses, each reaching back through its own window; the memory is carried from one to the next.
        activation_checkpointing: a language layer's activations are computed again in the backward pass instead
            of stored: less memory, more time, the same gradients.
        feature_cache_gib: main memory per worker for what frozen vision towers make of pictures, which are then
            seen once, not in every epoch; 0 for none.
        sharding: "ddp", or "fsdp" where a model is too large for one worker's memory; a single worker has none.
    """

    steps: int = 1000
    precision: str = "auto"
    log_every: int = 20
    checkpoint_every: int = 200
    checkpoints_kept: int = 2
    threads: int = 1
    until: int | None = None
    accumulate: int = 1
    activation_checkpointing: bool = False
    sharding: str = "ddp"
    feature_cache_gib: float = 0.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"training.precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"training.sharding is {self.sharding!r}; choose one of {', '.join(SHARDINGS)}")
        if self.precision == "fp16" and self.sharding == "fsdp":
            raise ValueError("training.precision fp16 needs training.sharding ddp; or take fp32 or bf16")
        for name in ("steps", "log_every", "checkpoint_every", "checkpoints_kept", "threads", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        if self.feature_cache_gib < 0:
            raise ValueError(f"training.feature_cache_gib is {self.feature_cache_gib}; it must be at least 0")
        if self.until is not None and not 1 <= self.until <= self.steps:
            raise ValueError(
                f"training.until is {self.until}; it must lie in 1..training.steps, here {self.steps}"
            )

    @property
    def end(self) -> int:
        """The last step for now."""
        return self.until or self.steps


def train(
    state: TrainingState,
    lanes: LaneReader,
    config: TrainingConfig,
    optimizer: OptimizerConfig,
    world: World,
    sink: MetricSink,
    save: Callable[[], None],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains `state` from where it stands up to `config.end`.

    Args:
        save: called for every checkpoint.
        stop: asked after every step; once it says so to one worker, all end with a checkpoint.
    """
    state.trained.train()
    meter, autocast = Meter(), autocast_format(config.precision, world.device)
    with closing(lanes.batches(state.position)) as batches:
        while state.step < config.end:
            positions, windows = zip(*islice(batches, config.accumulate), strict=True)
            lr = optimizer.learning_rate(state.step, config.steps)
            metrics = training_step(state, windows, lr, optimizer.max_grad_norm, autocast)
            state.step += 1
            state.position = lanes.after(positions[-1])
            meter.add(metrics, frames=sum(int(window.valid.sum()) for window in windows) * world.size)
            if state.protection and (reading := state.protection.regulate(state.step, world)):
                sink.log(reading, state.step)
            if state.step % config.log_every == 0 or state.step == config.end:
                surgery = state.protection.readings() if state.protection else {}
                read = lanes.readings(positions[-1])
                sink.log({**meter.take(), **surgery, **read, "train/lr": lr}, state.step)
            stopped = world.any(stop())
            if stopped or state.step % config.checkpoint_every == 0 or state.step == config.end:
                save()
            if stopped:
                return


class Meter:
    """Means since the last look, and frames per second."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._frames = 0
        self._since = time.perf_counter()

    def add(self, metrics: dict[str, float], frames: int) -> None:
        self._frames += frames
        self._counts.update(metrics.keys())
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means under `train/NAME`, `train/seconds` since the last look and `train/frames_per_s` in them."""
        means = {f"train/{name}": total / self._counts[name] for name, total in self._sums.items()}
        means["train/seconds"] = time.perf_counter() - self._since
        means["train/frames_per_s"] = self._frames / means["train/seconds"]
        self._reset()
        return means
