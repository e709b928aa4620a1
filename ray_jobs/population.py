"""PB2: trials side by side whose settings move while they train; the worst go on from the best.

Parker-Holder et al., "Provably Efficient Online Hyperparameter Optimization with Population-Based Bandits",
arXiv 2002.02518, as Ray has it. At each checkpoint every trial waits for the others; then those of the lowest
scores take the checkpoint of one of the highest, and settings that a Gaussian process proposes. From there on they
are runs of their own, `NAME-TRIAL-STEP`, which begin with that checkpoint. After the loss of its driver a sweep
goes on from every trial's last checkpoint, but the process has forgotten what it had seen.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ray import tune

from ipvla.experiment import ExperimentConfig
from ipvla.policy import CheckpointError
from ray_jobs.command_line.settings import SettingError
from ray_jobs.train import INHERITED
from ray_jobs.tuning.search_space import Dimension
from ray_jobs.tuning.trial import SCORE, STEP

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

#: What a member reports beside its scores: the end of its run's name.
RUN: Final = "run"
#: Share of the population that gives up its own way at each checkpoint, for the best one's.
_QUANTILE = 0.25
_RECORD = "member.json"


def require_moving(space: Mapping[str, Dimension]) -> None:
    """SettingError unless every setting can move within a range of real numbers."""
    for name, dimension in space.items():
        reason = None
        if dimension.choices:
            reason = f"has choices {list(dimension.choices)}"
        elif dimension.is_whole:
            reason = f"has whole numbers from {dimension.low} to {dimension.high}"
        elif dimension.log:
            reason = "is logarithmic"
        if reason:
            raise SettingError(
                f"space.{name} {reason}; scheduler pb2 moves settings within linear ranges of real numbers, as in "
                "{low: 0.0, high: 1.0}: change it, leave it out, or choose another scheduler"
            )


def scheduler(space: Mapping[str, Dimension], every: int) -> TrialScheduler:
    """PB2 that moves these settings every so many steps."""
    from ray.tune.schedulers.pb2 import PB2

    return PB2(
        time_attr=STEP,
        metric=SCORE,
        mode="max",
        perturbation_interval=every,
        hyperparam_bounds={name: [dimension.low, dimension.high] for name, dimension in space.items()},
        quantile_fraction=_QUANTILE,
        synch=True,
    )


def driver(concurrent: int) -> tune.PlacementGroupFactory:
    """What a member's driver asks for: so much of the head node that so many can run at a time, and no more.

    The rest is for Ray Train, which asks for a thousandth of the head node for every training.
    """
    share = (math.floor(1e4 / (concurrent + 1)) + 1) / 1e4
    return tune.PlacementGroupFactory([{"node:__internal_head__": share}])


@dataclass(frozen=True)
class Member:
    """Where a trial stands.

    Attributes:
        run: the end of its run's name.
        step: up to which that is trained.
        values: dotted name -> the value that it has.
    """

    run: str
    step: int
    values: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: tune.Checkpoint) -> Member:
        """The member that left this checkpoint of Ray Tune's."""
        with checkpoint.as_directory() as directory:
            return cls(**json.loads((Path(directory) / _RECORD).read_text()))

    def report(self, told: Mapping[str, Any]) -> None:
        """Tells Ray Tune, with a checkpoint that says which run this is."""
        with tempfile.TemporaryDirectory() as directory:
            record = {"run": self.run, "step": self.step, "values": dict(self.values)}
            (Path(directory) / _RECORD).write_text(json.dumps(record))
            checkpoint = tune.Checkpoint.from_directory(directory)
            tune.report({STEP: self.step, RUN: self.run, **told}, checkpoint=checkpoint)


def inherit(theirs: ExperimentConfig, step: int, ours: ExperimentConfig) -> None:
    """Lets run `ours` begin with the checkpoint that `theirs` has of this step, as if it were its own.

    Raises:
        CheckpointError: there is none; `training.checkpoints_kept` is too small, or it was deleted.
    """
    whole = ours.run_directory / INHERITED
    if whole.exists():
        return
    checkpoint = theirs.run_directory / "trainer" / f"step_{step:06d}"
    if not (checkpoint / "training.json").exists():
        raise CheckpointError(
            f"there is no checkpoint {checkpoint} to go on from; raise training.checkpoints_kept"
        )
    partial = whole.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    record = partial / "training.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "identity": ours.identity}, indent=1))
    partial.rename(whole)
