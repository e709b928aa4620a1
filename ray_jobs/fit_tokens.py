"""`python -m ray_jobs.fit_tokens`: fits an action tokenizer (FAST or RVQ) to a dataset's chunks, before training.

FAST takes seconds to minutes on a CPU, RVQ minutes. The tokenizer is fitted to actions as training normalises them
and leaves out dimensions that are constant in the dataset: give the `data` and the chunk of the training.

    ipvla fit_tokens --data.dataset recall --chunk 8
    ipvla fit_tokens --data.dataset recall --chunk 8 --tokenizer.type rvq --tokenizer.steps 5000
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ipvla.data.mixture_dataset import Dataset
from ipvla.data.source import BrokenEpisodeError
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.action_tokens import ActionTokenizer
from ipvla.models.action_tokens.fast import FastSettings, FastTokens
from ipvla.models.action_tokens.rvq import RVQPart, RVQSettings, RVQTokens, one_part
from ipvla.models.heads.tokens import held
from ipvla.models.vla import IPVLAConfig
from ipvla.storage import StorageRoots
from ipvla.types import NO_TOKEN
from ray_jobs.command_line.cli import run
from ray_jobs.running.display import EpisodeProgress

#: Of so many episodes one is left out of the fit, and measured.
_HELD_OUT = 10

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class FitConfig(draccus.ChoiceRegistry):
    """A choice by `type`: fast or rvq."""

    @property
    def total(self) -> int:
        """How often `fit` reports progress."""
        return 1

    def check(self, chunk: int) -> None:
        """ValueError in one line for a chunk that the tokenizer cannot take."""

    def fit(self, chunks: torch.Tensor, device: str, progress: Progress) -> ActionTokenizer:
        """A tokenizer of chunks float32 [N, C, A]."""
        raise NotImplementedError


@FitConfig.register_subclass("fast")
@dataclass(frozen=True)
class FastFitConfig(FitConfig):
    """vocab_size: most tokens; scale: steps per unit of a frequency, more for a smaller error and more tokens."""

    vocab_size: int = 1024
    scale: float = 10

    def __post_init__(self) -> None:
        FastSettings(self.scale, self.vocab_size)

    def fit(self, chunks: torch.Tensor, device: str, progress: Progress) -> ActionTokenizer:
        tokenizer = FastTokens.fit(chunks.numpy(), self.vocab_size, self.scale)
        progress(1, 0.0)
        return tokenizer


@FitConfig.register_subclass("rvq")
@dataclass(frozen=True)
class RVQFitConfig(FitConfig):
    """Sizes as in `ipvla.models.action_tokens.rvq.RVQSettings`.

    Attributes:
        depth: tokens per latent.
        parts: dimensions that get networks of their own, counted among those that vary, as [[0, 1, 2], [3]]; by
            default one network has them all.
        codes: per codebook.
        code_dim: numbers in a code.
        latent: numbers in a latent.
        channels: of the first convolution, doubled at each halving of time.
        levels: halvings of time; a chunk's length must be a multiple of 2^levels.
        steps, batch, lr: of training; seed: of its batches and weights.
    """

    depth: int = 4
    parts: list[list[int]] = field(default_factory=list)
    codes: int = 256
    code_dim: int = 16
    latent: int = 64
    channels: int = 32
    levels: int = 3
    steps: int = 5000
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.lr <= 0:
            raise ValueError(
                f"tokenizer.steps {self.steps} and batch {self.batch} must be at least 1, and lr {self.lr} above 0"
            )

    @property
    def total(self) -> int:
        return self.steps

    def check(self, chunk: int) -> None:
        self._settings(chunk, sum(map(len, self.parts)) or 1)

    def fit(self, chunks: torch.Tensor, device: str, progress: Progress) -> ActionTokenizer:
        torch.manual_seed(self.seed)
        tokenizer = RVQTokens(self._settings(*chunks.shape[1:])).to(device)
        tokenizer.fit(chunks, self.steps, self.batch, self.lr, self.seed, progress)
        return tokenizer

    def _settings(self, chunk: int, action_dim: int) -> RVQSettings:
        parts = tuple(RVQPart(tuple(dims), self.depth) for dims in self.parts) or one_part(action_dim, self.depth)
        sizes = (self.codes, self.code_dim, self.latent, self.channels, self.levels)
        settings = RVQSettings(chunk, parts, *sizes)
        if settings.action_dim != action_dim:
            raise ValueError(
                f"tokenizer.parts have {settings.action_dim} dimensions, and {action_dim} vary in the dataset; "
                f"give each of 0..{action_dim - 1} once"
            )
        return settings


@dataclass(frozen=True)
class FitTokensConfig(StorageRoots):
    """From a dataset to `artifact_dir/NAME`.

    Attributes:
        name: of the tokenizer; by default tokens_, its type, _ and the dataset.
        data: as in training.
        chunk: C, as `model.chunk` in training.
        every: control steps from one chunk to the next.
        tokenizer: what is fitted, and how.
        use_gpu: RVQ trains on a GPU.
    """

    name: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    chunk: int = 8
    every: int = 1
    tokenizer: FitConfig = field(default_factory=FastFitConfig)
    use_gpu: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 control step")
        self.tokenizer.check(IPVLAConfig(chunk=self.chunk).chunk)

    @property
    def directory(self) -> Path:
        kind = self.tokenizer.get_choice_name(type(self.tokenizer))
        return self.artifacts / (self.name or f"tokens_{kind}_{Path(self.data.dataset).name}")


@dataclass(frozen=True)
class Fitted:
    """A tokenizer and what it is worth on chunks that it was not fitted on.

    Attributes:
        rms: root mean square error of a round trip, normalised units; largest: the largest error.
        tokens: per chunk, on average; bins: as many as `bins` would take.
    """

    tokenizer: ActionTokenizer
    rms: float
    largest: float
    tokens: float
    bins: int


def fit(config: FitTokensConfig) -> Fitted:
    """Fits and measures the tokenizer, and writes it.

    Raises:
        DatasetError: the dataset is missing or damaged.
        ValueError: there is such a tokenizer already, or the settings do not fit the data.
    """
    config.prepare(writes=("artifact_dir",))
    if config.directory.exists():
        raise ValueError(f"name: {config.directory} is there already; give another --name, or delete it")
    roots = {flag: getattr(config, flag) for flag in StorageRoots.__dataclass_fields__}
    training = ExperimentConfig(**roots, data=config.data, model=IPVLAConfig(chunk=config.chunk))
    dataset = training.open_dataset()
    with EpisodeProgress() as progress:
        bar = progress.add_task("reading", total=len(dataset))
        shown, held_out = chunks_of(config, training, dataset, lambda: progress.advance(bar))
    with EpisodeProgress(unit="steps") as progress:
        bar = progress.add_task("fitting", total=config.tokenizer.total)
        device = "cuda" if config.use_gpu else "cpu"
        tokenizer = config.tokenizer.fit(shown, device, lambda step, loss: progress.update(bar, completed=step))
    tokenizer.cpu().save(config.directory)
    return measured(tokenizer, held_out)


def chunks_of(
    config: FitTokensConfig, training: ExperimentConfig, dataset: Dataset, on_episode: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks float32 [N, C, A] of what varies: to fit to, and those of every tenth episode, to measure on."""
    conventions = training.conventions(dataset)
    varies = ~conventions.statistics.constant
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for index in range(len(dataset)):
        on_episode()
        try:
            action = dataset.episode(index).action
        except BrokenEpisodeError:
            if not dataset.skips_bad_episodes:
                raise
            continue
        own = conventions.of(dataset.part(index))
        targets, valid = own.chunk_targets(action, np.arange(0, len(action), config.every))
        chunks = held(torch.from_numpy(targets[..., varies]), torch.from_numpy(valid))
        parts[index % _HELD_OUT == _HELD_OUT - 1].append(chunks)
    shown = torch.cat(parts[0])
    return shown, torch.cat(parts[1]) if parts[1] else shown


def measured(tokenizer: ActionTokenizer, chunks: torch.Tensor) -> Fitted:
    """What a tokenizer is worth on chunks float32 [N, C, A]."""
    tokens = tokenizer.encode(chunks)
    error = tokenizer.decode(tokens, *chunks.shape[1:]) - chunks
    per_chunk = float((tokens != NO_TOKEN).sum(1).float().mean())
    bins = chunks[0].numel()
    return Fitted(tokenizer, float(error.square().mean().sqrt()), float(error.abs().max()), per_chunk, bins)


def main(config: FitTokensConfig) -> None:
    """Fits, and says what the tokenizer is worth and how training takes it."""
    fitted = fit(config)
    table = Table(title=fitted.tokenizer.identity.split("{")[0].strip())
    for heading in ("tokens per chunk", "as bins", "rms error", "largest error"):
        table.add_column(heading, justify="right")
    figures = (f"{fitted.tokens:.1f}", str(fitted.bins), f"{fitted.rms:.4f}", f"{fitted.largest:.3f}")
    table.add_row(*figures)
    Console().print(table)
    kind = config.tokenizer.get_choice_name(type(config.tokenizer))
    print(
        f"written to {config.directory}; train with --model.head.type tokens --model.head.tokenizer.type {kind} "
        f"--model.head.tokenizer.file {config.directory}"
    )


if __name__ == "__main__":
    run(FitTokensConfig, main, __doc__)
