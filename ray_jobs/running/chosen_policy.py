"""One trained policy that a job of a single process loads: the settings that say which, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ipvla.models.heads import Sampling
from ipvla.models.speeds import SlowPace
from ipvla.policy import Policy
from ipvla.storage import StorageRoots
from ray_jobs.running.cluster import no_gpu


@dataclass(frozen=True)
class ChosenPolicy(StorageRoots):
    """Which policy, and where it answers.

    Attributes:
        policy: its directory; by default that of run `name`.
        study: the study of run `name`.
        name: of a trained run, `run_root_dir/study/name`.
        threads: CPU threads of a forward pass.
        use_gpu: the policy acts on the GPU.
        unnorm_key: the dataset whose statistics turn what the policy says into actions, if it was trained on a
            mixture; by default its first.
        sampling: integration steps and integrator of a flow head; by default those of its training.
        slow: how often the slow part of a policy at two speeds thinks, and how long that takes.
    """

    policy: Path | None = None
    study: str = "recall"
    name: str = ""
    threads: int = 1
    use_gpu: bool = False
    unnorm_key: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    slow: SlowPace = field(default_factory=SlowPace)

    def __post_init__(self) -> None:
        if (self.policy is None) == (not self.name):
            raise ValueError("give --policy DIRECTORY or --name RUN, one of them")
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")

    @property
    def directory(self) -> Path:
        return self.policy or self.runs / self.study / self.name / "policy"

    def load(self) -> Policy:
        """The policy, in evaluation mode.

        Raises:
            CheckpointError: it does not exist, or is damaged.
            ClusterError: there is no GPU to use.
            ValueError: `unnorm_key`, `sampling` or `slow` do not fit it.
        """
        if self.use_gpu and not torch.cuda.is_available():
            raise no_gpu()
        device = "cuda" if self.use_gpu else "cpu"
        return Policy.load(self.directory, device, self.unnorm_key, self.sampling, self.slow)
