"""`python -m ray_jobs.quickstart`: demonstrations -> two policies that differ only in memory -> who succeeds?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evaluators.console import success_table
from ipvla.experiment import ExperimentConfig
from ipvla.storage import SOURCE_TREE, StorageRoots
from ipvla.tracking import MLflowSink, read_jsonl
from ray_jobs.cli import run
from ray_jobs.cluster import connect
from ray_jobs.collect import CollectConfig, CollectSummary, collect
from ray_jobs.evaluate import EvaluateConfig, Evaluation, comparison_table, evaluate, report
from ray_jobs.progress import CollectionDisplay
from ray_jobs.settings import parse
from ray_jobs.train import TrainSummary, summarise

MEMORIES = ("none", "gru")
_PRESETS = SOURCE_TREE / "ray_jobs" / "experiments" / "quickstart"
_SMOKE = "SMOKE RUN: too little data and training to say anything about memory; it shows that every part runs."


@dataclass(frozen=True)
class QuickstartConfig(StorageRoots):
    """How much of it.

    Attributes:
        tier: "full" (about a quarter of an hour on two cores) or "smoke" (a few minutes, results mean nothing).
    """

    tier: str = "full"

    def __post_init__(self) -> None:
        if self.tier not in ("full", "smoke"):
            raise ValueError(f'tier is {self.tier!r}; choose "full" or "smoke"')

    @property
    def study(self) -> str:
        return "quickstart" if self.tier == "full" else "quickstart-smoke"

    @property
    def flags(self) -> list[str]:
        """The storage flags, for the jobs that quickstart consists of."""
        return [part for name, path in self.directories.items() for part in (f"--{name}", str(path))]

    def preset(self, name: str) -> list[str]:
        return ["--config_path", str(_PRESETS / self.tier / f"{name}.yaml"), *self.flags]

    @property
    def collection(self) -> CollectConfig:
        return parse(CollectConfig, self.preset("collect"))

    def training_arguments(self, memory: str, parent_run_id: str | None) -> list[str]:
        """Of `ray_jobs.train`; the policies differ in nothing but these names."""
        parent = ["--parent_run_id", parent_run_id] if parent_run_id else []
        names = ["--study", self.study, "--name", memory, "--model.memory.type", memory]
        return [*self.preset("train"), *names, *parent]

    def training(self, memory: str) -> ExperimentConfig:
        return parse(ExperimentConfig, self.training_arguments(memory, None))

    def evaluation(self, parent_run_id: str | None) -> EvaluateConfig:
        policies = f"[{', '.join(MEMORIES)}]"
        config = parse(EvaluateConfig, [*self.preset("evaluate"), "--study", self.study, "--policies", policies])
        return replace(config, parent_run_id=parent_run_id)


def train_all(config: QuickstartConfig, parent_run_id: str | None, console: Console) -> dict[str, TrainSummary]:
    """Trains every policy side by side, each by its own `ray_jobs.train`, and shows how far they are.

    Raises:
        RuntimeError: a training failed; its log says why.
    """
    experiments = {memory: config.training(memory) for memory in MEMORIES}
    with ExitStack() as stack:
        progress = stack.enter_context(_training_progress(console))
        jobs = {}
        for memory, experiment in experiments.items():
            experiment.run_directory.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context((experiment.run_directory / "log.txt").open("a"))
            arguments = config.training_arguments(memory, parent_run_id)
            jobs[memory] = subprocess.Popen(
                [sys.executable, "-m", "ray_jobs.train", *arguments],
                cwd=SOURCE_TREE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            )
            stack.callback(_end, jobs[memory])
        bars = {
            memory: progress.add_task(f"training {memory}", total=experiment.training.steps, note="starting")
            for memory, experiment in experiments.items()
        }
        while any(job.poll() is None for job in jobs.values()):
            time.sleep(1)
            for memory, experiment in experiments.items():
                _show(progress, bars[memory], experiment.run_directory / "metrics.jsonl")
                if jobs[memory].poll():
                    raise RuntimeError(
                        f"training {memory} failed; see {experiment.run_directory / 'log.txt'}, then start again"
                    )
    return {memory: summarise(experiment) for memory, experiment in experiments.items()}


def _training_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        speed_estimate_period=120,
    )


def _show(progress: Progress, bar: Any, metrics: Path) -> None:
    lines = read_jsonl(metrics) if metrics.exists() else []
    if lines:
        last = lines[-1]
        note = f"loss {last['train/loss']:.3f}, {last['train/frames_per_s']:.0f} frames/s"
        progress.update(bar, completed=last["step"], note=note)


def _end(job: subprocess.Popen[bytes]) -> None:
    if job.poll() is None:
        job.send_signal(signal.SIGINT)
        try:
            job.wait(20)
        except subprocess.TimeoutExpired:
            job.kill()


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
        "paired": [asdict(c) | {"p_value": c.p_value} for c in evaluation.comparisons],
        "mlflow": {
            "tracking_uri": uri,
            "experiment_id": mlflow.experiment_id,
            "run_ids": {"quickstart": mlflow.run_id, **evaluation.run_ids},
        },
    }


class Stopwatch:
    """Seconds that a study has taken over all its starts, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = float(path.read_text()) if path.exists() else 0.0
        self._started = time.monotonic()

    def read(self) -> float:
        """Seconds so far; also written down, for the next start."""
        total = self._before + time.monotonic() - self._started
        self._path.write_text(str(total))
        return total


def main(config: QuickstartConfig) -> None:
    """Runs what is missing of the study, then shows all of it."""
    config.prepare()
    console = Console()
    directory = config.runs / config.study
    directory.mkdir(parents=True, exist_ok=True)
    finished = directory / "summary.json"
    if finished.exists():
        console.print(f"{config.study} is complete; delete {directory} (and its dataset) to run it anew.")
    stopwatch = Stopwatch(directory / "seconds.txt")
    uri = config.mlflow_uri
    mlflow = MLflowSink(uri, experiment=config.study, run_name=config.study, run_key=str(directory))
    note = _SMOKE if config.tier == "smoke" else ""
    if note:
        console.print(f"[bold yellow]{note}")
    with connect(config):
        console.rule("1/3  demonstrations of the scripted expert")
        with CollectionDisplay(console) as display:
            collected = collect(config.collection, display.update)
        stopwatch.read()
        console.rule("2/3  two policies on the same demonstrations: without and with memory")
        trained = train_all(config, mlflow.run_id, console)
        stopwatch.read()
        console.rule("3/3  closed loop on layouts that neither has seen")
        settings = config.evaluation(mlflow.run_id)
        evaluation = evaluate(settings, console)
    if not finished.exists():
        summary = _summary(stopwatch.read(), collected, trained, evaluation, mlflow, uri)
        partial = finished.with_suffix(".partial")
        partial.write_text(json.dumps(summary, indent=1))
        partial.replace(finished)
    page = report(settings, evaluation, "Does memory matter? The Recall suite", note)
    for path in (finished, page):
        mlflow.log_artifact(path)
    mlflow.close()
    _tell(console, evaluation, finished, page, uri, note)


def _tell(console: Console, evaluation: Evaluation, summary: Path, page: Path, uri: str, note: str) -> None:
    told = json.loads(summary.read_text())
    console.rule()
    console.print(
        success_table(evaluation.tables, title=note or "Success on held-out layouts (Wilson 95 % intervals)")
    )
    console.print(comparison_table(evaluation.comparisons))
    rows: Sequence[tuple[str, str]] = (
        ("took", f"{told['wall_s'] / 60:.1f} minutes"),
        ("summary", str(summary)),
        ("report", str(page)),
        ("compare runs", f"{sys.executable} -m mlflow ui --backend-store-uri {uri}"),
    )
    for name, value in rows:
        console.print(f"{name:>12}  {value}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run(QuickstartConfig, main, __doc__)
