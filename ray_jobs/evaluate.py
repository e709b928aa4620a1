"""`python -m ray_jobs.evaluate`: closed-loop success of trained policies on held-out layouts, with intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.progress import (
    Progress,
    TaskID,
)
from rich.table import Table

from evaluators.console import success_table
from evaluators.episodes import write_episodes
from evaluators.paired import PairedComparison, compare
from evaluators.report import Report
from evaluators.success import SuccessConfig, Video
from evaluators.success_table import SuccessTable
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ipvla.storage import StorageRoots
from ipvla.types import EpisodeResult
from ray_jobs.cli import run
from ray_jobs.cluster import connect
from ray_jobs.policy_run import placed, policy_run
from ray_jobs.progress import episode_progress


@dataclass(frozen=True)
class EvaluateConfig(StorageRoots):
    """Which policies to evaluate, and on what.

    Attributes:
        study: the MLflow experiment; results go to `run_root_dir/study`.
        policies: names of trained runs of this study (`run_root_dir/study/NAME/policy`).
        success: suite, tasks, episodes, simulators.
        videos: record one success and one failure per task.
        use_gpu: the policy actor takes one GPU.
        parent_run_id: the MLflow run that the policies' runs are nested under, if any.
    """

    study: str = "recall"
    policies: tuple[str, ...] = ()
    success: SuccessConfig = field(default_factory=SuccessConfig)
    videos: bool = True
    use_gpu: bool = False
    parent_run_id: str | None = None

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError('policies is empty; name trained runs, for example --policies "[gru, none]"')

    @property
    def directory(self) -> Path:
        return self.runs / self.study


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to."""

    tables: tuple[SuccessTable, ...]
    comparisons: tuple[PairedComparison, ...]
    videos: tuple[Video, ...]
    run_ids: dict[str, str | None]


def evaluate(config: EvaluateConfig, console: Console) -> Evaluation:
    """Plays what the journals lack, for one policy after another, and records videos.

    Raises:
        CheckpointError: a policy does not exist or cannot be loaded.
        JournalError: results of another policy or protocol lie where these should go.
    """
    config.prepare()
    directories = {name: config.directory / name / "policy" for name in config.policies}
    for directory in directories.values():
        Policy.load(directory)  # told here rather than by an actor
    tables: list[SuccessTable] = []
    videos: list[Video] = []
    run_ids: dict[str, str | None] = {}
    load, success = placed(config.success, config.use_gpu)
    with connect(config), success.build(config.cache) as evaluation, episode_progress(console) as progress:
        for name, directory in directories.items():
            bar = progress.add_task(f"playing {name}", total=len(evaluation.specs))
            run_directory = directory.parent
            sink = policy_run(config, config.study, name, config.parent_run_id)
            source = PolicySource(load, directory)
            table = evaluation.run(
                name,
                source,
                run_directory / "episodes.sqlite",
                sink=sink,
                on_result=partial(_advance, progress, bar),
            )
            progress.update(bar, completed=len(evaluation.specs))
            if config.videos:
                progress.update(bar, description=f"recording {name}")
                recorded = evaluation.record(table, source, run_directory / "videos")
                for video in recorded:
                    sink.log_artifact(video.path)
                videos += recorded
            progress.update(bar, description=f"played {name}")
            sink.close()
            tables.append(table)
            run_ids[name] = sink.run_id
        comparisons = [c for a, b in combinations(tables, 2) for c in compare(a, b, evaluation.tasks)]
    return Evaluation(tuple(tables), tuple(comparisons), tuple(videos), run_ids)


def report(config: EvaluateConfig, evaluation: Evaluation, title: str, note: str = "") -> Path:
    """Writes `report.html` in the study's directory."""
    curves = {name: config.directory / name / "metrics.jsonl" for name in config.policies}
    return Report(
        title,
        evaluation.tables,
        note=note,
        comparisons=evaluation.comparisons,
        curves=curves,
        videos=evaluation.videos,
    ).write(config.directory / "report.html")


def comparison_table(comparisons: tuple[PairedComparison, ...]) -> Table:
    """Exact McNemar test per family, on the layouts that both policies played."""
    table = Table(title="Paired on the same layouts (exact McNemar)")
    for heading in ("family", "pairs", "only the first", "only the second", "p"):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for c in comparisons:
        name = f"{c.family}: {c.first} against {c.second}"
        table.add_row(name, str(c.pairs), str(c.only_first), str(c.only_second), f"{c.p_value:.2g}")
    return table


def _advance(progress: Progress, bar: TaskID, result: EpisodeResult) -> None:
    progress.advance(bar)


def main(config: EvaluateConfig) -> None:
    """Evaluates, prints the tables, writes `success.json`, `episodes.parquet` and `report.html`."""
    console = Console()
    evaluation = evaluate(config, console)
    console.print(success_table(evaluation.tables))
    if evaluation.comparisons:
        console.print(comparison_table(evaluation.comparisons))
    results = {table.policy: table.to_dict() for table in evaluation.tables}
    (config.directory / "success.json").write_text(json.dumps(results, indent=1))
    write_episodes(evaluation.tables, config.directory / "episodes.parquet")
    console.print(f"report: {report(config, evaluation, f'Success: {config.study}')}")


if __name__ == "__main__":
    run(EvaluateConfig, main, __doc__)
