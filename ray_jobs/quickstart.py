"""`python -m ray_jobs.quickstart`: demonstrations -> two policies that differ only in memory -> who succeeds?"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
from rich.console import Console

from evaluators.console import comparison_table, success_table
from ipvla.experiment import ExperimentConfig
from ipvla.files import write_text
from ipvla.storage import SOURCE_TREE, StorageRoots
from ipvla.tracking import MLflowSink, RunIdentity, without_password
from ray_jobs.collect import CollectConfig, CollectSummary, collect
from ray_jobs.command_line.cli import run
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig, Evaluation, evaluate, log_comparison, report
from ray_jobs.running.cluster import connect
from ray_jobs.running.display import CollectionDisplay
from ray_jobs.running.policy_run import warn_of_waiting
from ray_jobs.running.side_by_side import train_side_by_side
from ray_jobs.train import TrainSummary

MEMORIES = ("none", "gru")
_PRESETS = SOURCE_TREE / "ray_jobs" / "experiments" / "quickstart"
_WRITE_EVERY_S = 2.0
_SMOKE = "SMOKE RUN: too little data and training to say anything about memory; it shows that every part runs."


@dataclass(frozen=True)
class QuickstartConfig(StorageRoots):
    """How much of it.

    Attributes:
        tier: "full" (about a quarter of an hour on two cores) or "smoke" (a few minutes, results mean nothing).
        seed: of the trainings; each other than 0 is a study of its own, on the same demonstrations.
        precision: of the trainings; the preset's by default, any other is a study of its own.
    """

    tier: str = "full"
    seed: int = 0
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.tier not in ("full", "smoke"):
            raise ValueError(f'tier is {self.tier!r}; choose "full" or "smoke"')

    @property
    def study(self) -> str:
        parts = ["quickstart", "smoke" if self.tier == "smoke" else "", f"seed{self.seed}" if self.seed else ""]
        return "-".join(part for part in [*parts, self.precision or ""] if part)

    @property
    def flags(self) -> list[str]:
        """The storage flags, for the jobs that quickstart consists of."""
        return [part for name, path in self.directories.items() for part in (f"--{name}", str(path))]

    def preset(self, name: str) -> list[str]:
        return ["--config_path", str(_PRESETS / self.tier / f"{name}.yaml"), *self.flags]

    @property
    def collection(self) -> CollectConfig:
        return parse(CollectConfig, self.preset("collect"))

    def training(self, memory: str) -> ExperimentConfig:
        """The policies differ in nothing but these names."""
        names = ["--study", self.study, "--name", memory, "--model.memory.type", memory]
        names += ["--seed", str(self.seed), "--lanes.seed", str(self.seed)]
        names += ["--training.precision", self.precision] if self.precision else []
        parent = ["--parent_run_key", str(self.runs / self.study)]
        return parse(ExperimentConfig, [*self.preset("train"), *names, *parent])

    @property
    def evaluation(self) -> EvaluateConfig:
        policies = f"[{', '.join(MEMORIES)}]"
        config = parse(EvaluateConfig, [*self.preset("evaluate"), "--study", self.study, "--policies", policies])
        return replace(config, parent_run_key=str(self.runs / self.study))


def _summary(
    wall_s: float,
    collected: CollectSummary,
    trained: dict[str, TrainSummary],
    evaluation: Evaluation,
    mlflow: MLflowSink,
    uri: str,
) -> dict[str, Any]:
    return {
        "wall_s": wall_s,
        "collect": {name: getattr(collected, name) for name in ("demos", "control_steps", "cpu_ms_per_step")},
        "train": {
            memory: {name: getattr(summary, name) for name in ("frames_per_s", "wall_s", "final_loss")}
            for memory, summary in trained.items()
        },
        "success": {table.policy: table.to_dict() for table in evaluation.tables},
        "policies": {table.policy: table.record() for table in evaluation.tables},
        "paired": [comparison.to_dict() for comparison in evaluation.comparisons],
        "mlflow": {
            "tracking_uri": uri,
            "experiment_id": mlflow.experiment_id,
            "run_ids": {"quickstart": mlflow.run_id, **evaluation.run_ids},
        },
    }


class Stopwatch:
    """Seconds that a study has taken over all its starts, in a file.

    As a context manager it writes them down all the time, so that a start that is killed counts too.

    Args:
        started: of this start, in seconds since the epoch; now by default.
    """

    def __init__(self, path: Path, started: float | None = None) -> None:
        self._path = path
        self._before = float(path.read_text()) if path.exists() else 0.0
        self._started = time.monotonic() - (0.0 if started is None else time.time() - started)
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="stopwatch", daemon=True)

    def read(self) -> float:
        """Seconds so far; also written down, for the next start."""
        total = self._before + time.monotonic() - self._started
        with self._writing:
            write_text(self._path, str(total))
        return total

    def _work(self) -> None:
        while not self._ended.wait(_WRITE_EVERY_S):
            self.read()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.read()


def main(config: QuickstartConfig) -> None:
    """Runs what is missing of the study, then shows all of it."""
    config.prepare()
    console = Console()
    directory = config.runs / config.study
    directory.mkdir(parents=True, exist_ok=True)
    finished = directory / "summary.json"
    if finished.exists():
        console.print(
            f"{config.study} is complete; delete {directory} (and its dataset) to run it anew.", markup=False
        )
    identity = RunIdentity(config.mlflow_uri, config.study, config.study, str(directory))
    shown = without_password(config.mlflow_uri)
    mlflow = MLflowSink(identity, config.mlflow_spool)
    note = _SMOKE if config.tier == "smoke" else ""
    if note:
        console.print(f"[bold yellow]{note}")
    begun = psutil.Process().create_time()  # what was waited for began with it
    with Stopwatch(directory / "seconds.txt", begun) as stopwatch, connect(config):
        console.rule("1/3  demonstrations of the scripted expert")
        with CollectionDisplay(console) as display:
            collected = collect(config.collection, display.update)
        console.rule("2/3  two policies on the same demonstrations: without and with memory")
        runs = {memory: config.training(memory) for memory in MEMORIES}
        trained = train_side_by_side(runs, console)
        console.rule("3/3  closed loop on layouts that neither has seen")
        settings = config.evaluation
        evaluation = evaluate(settings, console)
    mlflow.flush()  # so that it has an id
    if not finished.exists():
        summary = _summary(stopwatch.read(), collected, trained, evaluation, mlflow, shown)
        write_text(finished, json.dumps(summary, indent=1))
    page = report(settings, evaluation, "Does memory matter? The Recall suite", note)
    log_comparison(settings, evaluation, mlflow)
    for path in (finished, page):
        mlflow.log_artifact(path)
    mlflow.close()
    _tell(console, evaluation, finished, page, shown, note)


def _tell(console: Console, evaluation: Evaluation, summary: Path, page: Path, uri: str, note: str) -> None:
    console.rule()
    console.print(
        success_table(evaluation.tables, title=note or "Success on held-out layouts (Wilson 95 % intervals)")
    )
    console.print(comparison_table(evaluation.comparisons))
    rows: Sequence[tuple[str, str]] = (
        ("took", f"{json.loads(summary.read_text())['wall_s'] / 60:.1f} minutes, over all starts"),
        ("summary", str(summary)),
        ("report", str(page)),
        ("compare runs", f"{sys.executable} -m mlflow ui --backend-store-uri {uri}"),
    )
    for name, value in rows:
        console.print(f"{name:>12}  {value}", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    run(QuickstartConfig, main, __doc__, warn_of_waiting)
