"""`python -m ray_jobs.sensitivity`: does a policy hear? How far its actions move by other words, or pictures.

    ipvla sensitivity libero_goal_no_noops --study goal --name mine
    ipvla sensitivity /data/arms --policy ~/ipvla_storage/runs/real/pi0/policy --instructions arms.yaml
    ipvla sensitivity libero_goal_no_noops --server ws://127.0.0.1:8000 --study goal --name pi05

Same noise, empty memory, no dropout. Prints synonym_l2, opposite_l2, image_l2 and their floors with intervals over
episodes, writes `sensitivity.json` beside the policy, and logs to the run `name`. Sets of instructions for recall,
libero_goal and libero_object lie in ipvla/sim/instructions; other data need one of their own.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console

from evaluators.asked_policy import AskedPolicy, LoadedPolicy, ServedPolicy
from evaluators.open_loop import require_fit
from evaluators.sensitivity import Guard, Sensitivity, sensitivity, sensitivity_table
from ipvla.data.dataset import EpisodeDataset
from ipvla.rollout.openpi.client import OpenpiSource
from ipvla.rollout.openpi.messages import TOKEN_VARIABLE
from ipvla.sim.instructions.sets import InstructionSet, set_for
from ray_jobs.command_line.cli import run
from ray_jobs.data import DatasetConfig
from ray_jobs.running.chosen_policy import ChosenPolicy
from ray_jobs.running.display import EpisodeProgress
from ray_jobs.running.policy_run import policy_run, warn_of_waiting


@dataclass(frozen=True)
class SensitivityConfig(ChosenPolicy, DatasetConfig):
    """Of which policy, and with what it is asked.

    Attributes:
        server: `ws://host:port` of an openpi server that is asked in place of a policy; its results go to run
            `name`, its key is `$IPVLA_SERVE_TOKEN`.
        instructions: a file with other words and opposites (ipvla/sim/instructions); by default the one there that
            knows most of the dataset's instructions.
        observations: how many, each of another episode as long as there are so many.
        noises: draws of noise that each is asked with, of a policy that takes noise.
        guard: limits; where one is not kept, the job says so and ends with exit code 1.
    """

    positional: ClassVar[str] = "dataset"

    server: str = ""
    instructions: Path | None = None
    observations: int = 64
    noises: int = 2
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server and not self.name:
            raise ValueError("server needs --name RUN, under which its results are written")
        for name, least in (("observations", 2), ("noises", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def asked(self, dataset: EpisodeDataset) -> AskedPolicy:
        """The policy, loaded, or its server.

        Raises:
            CheckpointError: the policy does not exist or is damaged.
            ClusterError: there is no GPU to use.
            ContractError: it reads or gives something else than the dataset holds.
            OpenpiError: the server does not answer.
        """
        if self.server:
            return ServedPolicy(OpenpiSource(self.server, os.environ.get(TOKEN_VARIABLE)), dataset)
        policy = self.load()
        require_fit(policy, dataset)
        return LoadedPolicy(policy)


def measure(config: SensitivityConfig, console: Console) -> tuple[Sensitivity, Path]:
    """The figures, and the file that has them.

    Raises:
        DatasetError: the dataset is missing or damaged.
        InstructionsError: a set has no opposites, or does not fit the dataset.
        Everything else as `SensitivityConfig.asked` does.
    """
    config.prepare()
    given = None if config.instructions is None else InstructionSet.load(config.instructions)
    torch.set_num_threads(config.threads)
    dataset = config.open_dataset()
    instructions = given or set_for(dataset.instructions())
    with closing(config.asked(dataset)) as asked, EpisodeProgress(console) as progress:
        bar = progress.add_task(dataset.name, total=config.observations)
        found = sensitivity(
            config.name or str(config.directory),
            asked,
            dataset,
            instructions,
            observations=config.observations,
            noises=config.noises,
            on_observation=lambda: progress.advance(bar),
        )
    told = {"dataset": dataset.location, "instructions": str(instructions.path), "server": config.server or None}
    path = found.write(config.directory.parent / "sensitivity.json", told)
    if config.name:
        sink = policy_run(config, config.study, config.name, renews=True)
        found.log(sink, dataset.name)
        sink.log_artifact(path)
        sink.close()
    return found, path


def main(config: SensitivityConfig) -> int:
    """Prints the table, where the numbers are, and which limits are not kept; 1 if some are not."""
    console = Console()
    found, path = measure(config, console)
    console.print(sensitivity_table(found))
    console.print(f"written: {path}", markup=False, soft_wrap=True)
    broken = config.guard.broken(found)
    for line in broken:
        console.print(line, markup=False, soft_wrap=True)
    return 1 if broken else 0


if __name__ == "__main__":
    run(SensitivityConfig, main, __doc__, warn_of_waiting)
